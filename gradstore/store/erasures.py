"""What was erased is known by hashes alone, and refused if it comes again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradstore.errors import DataError, StoreMissing
from gradstore.store import audit, catalog

if TYPE_CHECKING:
    from torch import Tensor

    from gradstore.store.store import Store


@dataclass(frozen=True)
class Refused:
    """Hashes of the ids and of the token sequences that a store was told to erase."""

    identity: str
    ids: frozenset[str]
    tokens: frozenset[str]

    @classmethod
    def of(cls, store: Store) -> Refused:
        """What the store refuses now."""
        rows, sql = [], "SELECT id_hash, tokens_hash FROM erasures WHERE allowed_at IS NULL"
        with suppress(StoreMissing):  # an empty store
            rows = store.rows(sql) if store.has("erasures") else []
        ids = frozenset(id for id, _ in rows)
        tokens = frozenset(tokens for _, tokens in rows if tokens)
        return cls(store.format.store, ids, tokens)

    def among(self, samples: Mapping[str, Tensor]) -> dict[str, list[str]]:
        """Those of ``samples`` (token ids by id) that are refused, with the hashes that say so."""
        if not self.ids:
            return {}
        found = {}
        for sample, tokens in samples.items():
            own = _hashes(self.identity, sample, tokens)
            said = [hash for hash in own if hash in self.ids | self.tokens]
            if said:
                found[sample] = said
        return found

    def check(self, samples: Mapping[str, Tensor]) -> None:
        """Raise :class:`DataError` if one of ``samples`` (token ids by id) was erased."""
        for sample, hashes in self.among(samples).items():
            what = (
                "was erased from this store"
                if hashes[0] in self.ids
                else ("has the tokens of a record that was erased from this store")
            )
            raise DataError(
                f"{sample!r} {what}; take it out of the data, or if it may be kept again, run the "
                "same command with --allow-erased (in Python: gradstore.store.erasures.allow)"
            )


def hash_of_tokens(identity: str, tokens: Tensor) -> str:
    """The name of a sequence of token ids (t,) in the erasures of one store."""
    return audit.hash_of(identity, tokens.cpu().numpy().astype("<i4", copy=False).tobytes())


def _hashes(identity: str, sample: str, tokens: Tensor) -> tuple[str, str]:
    return audit.hash_of(identity, sample), hash_of_tokens(identity, tokens)


def allow(store: Store, samples: Mapping[str, Tensor]) -> list[str]:
    """Let erased samples (token ids by id) come in again; returns their ids.

    Another erased sample with the same tokens stays refused, by its id alone. Each that is allowed
    leaves an entry in the audit chain. Erasing one again refuses it again.
    """
    found = Refused.of(store).among(samples)
    if found:
        with store.transaction() as connection:
            for sample, hashes in found.items():
                own, tokens = _hashes(store.format.store, sample, samples[sample])
                connection.execute(
                    "UPDATE erasures SET allowed_at = ? WHERE allowed_at IS NULL AND id_hash = ?",
                    [catalog.now(), own],
                )
                connection.execute(
                    """UPDATE erasures SET tokens_hash = NULL
                       WHERE allowed_at IS NULL AND tokens_hash = ?""",
                    [tokens],
                )
                audit.append(connection, "override", " ".join(hashes), {"allowed": "ingest"})
    return list(found)


def note(store: Store, id: str) -> str:
    """What to add where no sample has an id: the day it was erased, or nothing."""
    if not store.has("erasures"):
        return ""
    name = audit.hash_of(store.format.store, id)
    sql = "SELECT max(asked_at) FROM erasures WHERE id_hash = ? AND sample_id IS NULL"
    [(when,)] = store.rows(sql, [name])
    return f" (it was erased on {when:%Y-%m-%d}, UTC)" if when else ""


def known(store: Store, ids: Iterable[str]) -> list[str]:
    """Those of ``ids`` that were erased from the store."""
    if not store.has("erasures"):
        return []
    rows = store.rows("SELECT id_hash FROM erasures WHERE sample_id IS NULL")
    erased = {hash for (hash,) in rows}
    return [id for id in ids if audit.hash_of(store.format.store, id) in erased]
