"""Recovery: what a killed process made durable is entered, what it was removing is removed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gradstore.errors import StoreBusy, StoreUnwritable
from gradstore.store import catalog
from gradstore.store.manifest import in_order, read_manifest, segment_path, segment_paths

if TYPE_CHECKING:
    from gradstore.store.store import Store


def finish(store: Store) -> None:
    """Finish what others began, if nobody else is at it."""
    try:
        if not store.is_current():
            store.recover(seconds=0)
        if (store.root / catalog.ERASING).exists():
            from gradstore.store.erase import resume

            resume(store)
    except (StoreBusy, StoreUnwritable):
        pass  # its owner commits by itself; on a full disk what is published is readable


def recover(root: Path, seconds: float) -> int:
    """Enter every durable segment that the catalog lacks; returns how many there were.

    What is left on disk of a segment that another has replaced is removed instead. Raises
    :class:`StoreBusy` if the catalog stays locked for longer than ``seconds``.
    """
    paths = {path.relative_to(root).as_posix(): path for path in segment_paths(root)}
    with catalog.transaction(root, seconds) as connection:
        known = {path for (path,) in connection.execute("SELECT path FROM segments").fetchall()}
        missing = paths.keys() - known - {*catalog.replaced(connection)}
        entered = in_order(root, [paths[name] for name in missing])
        for name in entered:
            catalog.commit_segment(connection, name, read_manifest(segment_path(root, name)))
        gone = {*catalog.replaced(connection)}
    for name in gone & paths.keys():
        shutil.rmtree(paths[name], ignore_errors=True)  # another reader may be removing it too
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
        store.refresh()
        if not (store.is_current() and store.has("erasures")):  # or not migrated yet
            store.recover()
        yield
