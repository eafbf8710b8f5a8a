"""Segments for workers on other machines: each fetches what it reads, into a cache of its own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradstore.errors import EncryptionError
from gradstore.store import catalog, format
from gradstore.store.files import make_folder, sha256_of
from gradstore.store.manifest import MANIFEST, segment_path
from gradstore.store.remote import Remote, home, used

if TYPE_CHECKING:
    from gradstore.store.store import Store

SECONDS = 60  # to wait for another worker that fetches a manifest


@dataclass(frozen=True)
class Distant:
    """A segment of a store whose segments lie elsewhere, as it is sent to another machine.

    ``digest`` is that of its manifest: no machine takes another segment for it.
    """

    root: Path
    name: str
    digest: str
    stated: format.StoreFormat

    def here(self) -> Path:
        """Where this machine reads it: in the store if that is here, else in its own cache.

        Raises :class:`StoreUnreachable`, :class:`StoreDamaged` where it is not what it was, or
        :class:`StoreBusy`.
        """
        assert self.stated.elsewhere is not None
        cache = home(self.stated.elsewhere.url)
        for path in (self.root / self.name, cache / self.name):
            if self._lies_at(path):
                used(path)
                return path
        if self.stated.encryption is not None:
            raise EncryptionError(
                f"{self.root} is encrypted, and its keys stay in its folder: score it on a machine "
                "that has that, without --executor dask:ADDRESS"
            )
        make_folder(cache)
        with catalog.lock(cache / "lock", SECONDS, "fetching into"):
            if not self._lies_at(path):
                self.stated.save(cache)
                shutil.rmtree(path, ignore_errors=True)  # another segment had its name once
                Remote(cache, self.stated).adopt(self.name, self.digest)
        return path

    def _lies_at(self, path: Path) -> bool:
        with suppress(OSError):
            return sha256_of(path / MANIFEST) == self.digest
        return False


def anywhere(store: Store, names: Sequence[str]) -> Sequence[Path | Distant]:
    """Segments, by the catalog's names, for a function that may run on another machine."""
    stated, paths = format.load(store.root), [segment_path(store.root, name) for name in names]
    if stated.elsewhere is None:
        return paths
    digests = dict(store.rows("SELECT path, digest FROM segments"))
    return [Distant(store.root, name, digests[name], stated) for name in names]
