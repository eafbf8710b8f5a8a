"""Recovery: what a killed process made durable is entered, what it was removing is removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gradstore.errors import StoreBusy, StoreMissing, StoreUnreachable, StoreUnwritable
from gradstore.store import catalog, remote
from gradstore.store.manifest import in_order, read_manifest, segment_path, segment_paths

if TYPE_CHECKING:
    from gradstore.store.store import Store


def finish(store: Store) -> None:
    """Finish what others began, if nobody else is at it."""
    try:
        if not store.is_current():
            if store.format.elsewhere is None:
                store.recover(seconds=0)
            else:
                with alone(store):  # sending takes long: a writer that lives does it
                    pass
        if (store.root / catalog.ERASING).exists():
            from gradstore.upkeep.erase import resume

            resume(store)
    except (StoreBusy, StoreUnreachable, StoreUnwritable):
        pass  # its owner commits by itself; what is published is readable without disk and network


def recover(root: Path, seconds: float) -> int:
    """Enter every durable segment that the catalog lacks; returns how many there were.

    Where segments lie elsewhere one is durable when it is there. What is left of a segment that
    another has replaced is removed instead. Raises :class:`StoreBusy` if the catalog stays locked
    for longer than ``seconds``.
    """
    paths = {path.relative_to(root).as_posix(): path for path in segment_paths(root)}
    elsewhere = remote.of(root)
    with catalog.transaction(root, seconds) as connection:
        known = {path for (path,) in connection.execute("SELECT path FROM segments").fetchall()}
        missing = paths.keys() - known - {*catalog.replaced(connection)}
        if missing and elsewhere is not None:
            missing = {name for name in missing if elsewhere.has(paths[name])}
        entered = in_order(root, [paths[name] for name in missing])
        for name in entered:
            catalog.commit_segment(connection, name, read_manifest(segment_path(root, name)))
        gone = {*catalog.replaced(connection)}
    for name in gone & paths.keys():
        remote.discard(root, paths[name])  # another reader may be removing it too
    return len(entered)


@contextmanager
def alone(store: Store) -> Iterator[None]:
    """Keep everybody from writing segments and sketches, and clear up what the killed have left.

    Raises :class:`StoreBusy` while another process ingests, sketches, compacts or erases.
    """
    from gradstore.store.segment import collect_garbage

    with ExitStack() as held:
        folders = sorted((store.root / "segments").glob("r[0-9]*"))
        for folder in folders:
            held.enter_context(catalog.lock(folder / "lock", 0, "writing"))
        held.enter_context(catalog.lock(store.root / "sketches.lock", 0, "sketching or rewriting"))
        for folder in folders:
            collect_garbage(folder)
            send_rest(store, folder)
        store.refresh()
        if not (store.is_current() and store.has("erasures")):  # or not migrated yet
            store.recover()
        yield


def send_rest(store: Store, folder: Path) -> None:
    """Send what a killed writer of this rank had finished; the caller holds the rank's lock."""
    if store.format.elsewhere is None:
        return
    entered: set[str] = set()
    store.refresh()
    with suppress(StoreMissing):  # nothing is published yet
        sql = f"SELECT path FROM segments UNION {catalog.REPLACED}"
        entered = {path for (path,) in store.rows(sql)}
    for path in segment_paths(store.root):
        if path.parent == folder and path.relative_to(store.root).as_posix() not in entered:
            remote.send(store.root, path)
