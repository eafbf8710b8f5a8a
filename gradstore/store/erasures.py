"""What was erased is known by keyed hashes alone, and refused if it comes again.

The key is a file of its own: without it, neither the catalog nor a copy of it, nor the audit chain
tells whether an id was ever there. Older stores have salted hashes, which are still known.
"""

from __future__ import annotations

import hmac
import re
import secrets
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from gradstore.errors import DataError, StoreDamaged, StoreMissing
from gradstore.store import audit, catalog
from gradstore.store.files import replace_durably, unlinked, write_durably

if TYPE_CHECKING:
    from torch import Tensor

    from gradstore.store.store import Store

KEY = "erasures.key"
_KEYED = "hmac-sha256:"


def make_key(root: Path) -> None:
    """Give a store its key, unless it has one."""
    if _read_key(root) is None:
        temporary = root / f".tmp-{KEY}-{uuid.uuid4().hex}"
        write_durably(temporary, [_line(secrets.token_bytes(32)).encode()])
        replace_durably(temporary, root / KEY)


def _line(key: bytes) -> str:
    return f"{key.hex()} {sha256(key).hexdigest()}\n"


def _read_key(root: Path) -> bytes | None:
    """The key of a store, or None. Raises :class:`StoreDamaged`."""
    try:
        text = unlinked(root / KEY, root).read_bytes()[:1024].decode("latin-1")
    except FileNotFoundError:
        return None
    found = re.match("[0-9a-f]{64}", text)
    key = bytes.fromhex(found[0]) if found else b""
    if text != _line(key):
        raise _lost(root, "is not what its digest says")
    return key


def check_key(root: Path, hashes: Iterable[str]) -> None:
    """Raise :class:`StoreDamaged` if these hashes in a store want a key that is not there."""
    if _read_key(root) is None and any(name.startswith(_KEYED) for name in hashes):
        raise _lost(root, "is gone")


def _lost(root: Path, how: str) -> StoreDamaged:
    return StoreDamaged(
        f"{root / KEY} {how}: nobody can tell what was erased. Restore it from a backup, or "
        f"`gradstore verify -s {root} --repair`, after which it is no longer refused"
    )


def give_up(connection: catalog.Connection) -> int:
    """Refuse no longer what was erased under a key that is lost; returns how many records."""
    found = connection.execute(
        """UPDATE erasures SET allowed_at = ?, id_hash = 'lost', tokens_hash = NULL
           WHERE starts_with(id_hash, ?) RETURNING 1""",
        [catalog.now(), _KEYED],
    )
    return len(found.fetchall())


class Names:
    """The names that ids and token ids have in the erasures of one store.

    Raises :class:`StoreDamaged` for a key that is not what it was.
    """

    def __init__(self, store: Store) -> None:
        self._identity, self._key = store.format.store, _read_key(store.root)

    def all(self, content: str | Tensor) -> list[str]:
        """The name that an erasure would give an id, or token ids (t,), now; then older ones."""
        if isinstance(content, str):
            kind, data = b"id\n", content.encode()
        else:
            kind, data = b"tokens\n", content.cpu().numpy().astype("<i4", copy=False).tobytes()
        older = audit.hash_of(self._identity, data)
        if self._key is None:
            return [older]
        return [_KEYED + hmac.digest(self._key, kind + data, sha256).hex(), older]

    def now(self, content: str | Tensor) -> str:
        """The name that an erasure would give now."""
        return self.all(content)[0]


@dataclass(frozen=True)
class Refused:
    """Hashes of the ids and of the token sequences that a store was told to erase."""

    names: Names
    ids: frozenset[str]
    tokens: frozenset[str]

    @classmethod
    def of(cls, store: Store) -> Refused:
        """What the store refuses now. Raises :class:`StoreDamaged` if its key is gone."""
        rows, sql = [], "SELECT id_hash, tokens_hash FROM erasures WHERE allowed_at IS NULL"
        with suppress(StoreMissing):  # an empty store
            rows = store.rows(sql) if store.has("erasures") else []
        ids = frozenset(id for id, _ in rows)
        check_key(store.root, ids)
        tokens = frozenset(tokens for _, tokens in rows if tokens)
        return cls(Names(store), ids, tokens)

    def among(self, samples: Mapping[str, Tensor]) -> dict[str, list[str]]:
        """Those of ``samples`` (token ids by id) that are refused, with the hashes that say so."""
        if not self.ids:
            return {}
        found = {}
        for sample, tokens in samples.items():
            own = [name for name in self.names.all(sample) if name in self.ids]
            if said := own + [name for name in self.names.all(tokens) if name in self.tokens]:
                found[sample] = said
        return found

    def check(self, samples: Mapping[str, Tensor]) -> None:
        """Raise :class:`DataError` if one of ``samples`` (token ids by id) was erased."""
        for sample, hashes in self.among(samples).items():
            what = (
                "was erased from this store"
                if self.ids.intersection(hashes)
                else ("has the tokens of a record that was erased from this store")
            )
            raise DataError(
                f"{sample!r} {what}; take it out of the data, or if it may be kept again, run the "
                "same command with --allow-erased (in Python: gradstore.store.erasures.allow)"
            )


def allow(store: Store, samples: Mapping[str, Tensor]) -> list[str]:
    """Let erased samples (token ids by id) come in again; returns their ids.

    Another erased sample with the same tokens stays refused, by its id alone. Each that is allowed
    leaves an entry in the audit chain. Erasing one again refuses it again.
    """
    refused = Refused.of(store)
    if found := refused.among(samples):
        with store.transaction() as connection:
            for sample, hashes in found.items():
                connection.execute(
                    """UPDATE erasures SET allowed_at = ?
                       WHERE allowed_at IS NULL AND list_contains(?, id_hash)""",
                    [catalog.now(), refused.names.all(sample)],
                )
                connection.execute(
                    """UPDATE erasures SET tokens_hash = NULL
                       WHERE allowed_at IS NULL AND list_contains(?, tokens_hash)""",
                    [refused.names.all(samples[sample])],
                )
                audit.append(connection, "override", " ".join(hashes), {"allowed": "ingest"})
    return list(found)


def note(store: Store, id: str) -> str:
    """What to add where no sample has an id: the day it was erased, or nothing."""
    if not store.has("erasures"):
        return ""
    sql = """SELECT max(asked_at) FROM erasures
             WHERE list_contains(?, id_hash) AND sample_id IS NULL"""
    [(when,)] = store.rows(sql, [Names(store).all(id)])
    return f" (it was erased on {when:%Y-%m-%d}, UTC)" if when else ""


def known(store: Store, ids: Iterable[str]) -> list[str]:
    """Those of ``ids`` that were erased from the store."""
    if not store.has("erasures"):
        return []
    rows = store.rows("SELECT id_hash FROM erasures WHERE sample_id IS NULL")
    erased, names = {hash for (hash,) in rows}, Names(store)
    return [id for id in ids if erased.intersection(names.all(id))]
