"""A process that forks writers to be killed: the imports are paid for once.

Reads one JSON order a line: ``{"writers": {"<rank>": "<prefix of ids>"}, "after": seconds}`` kills
the writers that long after their start; with ``"point"`` in place of ``"after"`` a writer kills
itself at that point of :data:`POINTS` or :data:`SENDING`. The writers print ``ack <ids>`` for every
flush that returned; when all are dead, ``dead`` is printed with their exit statuses.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import pyarrow  # noqa: F401  (imported late by the catalog)
import torch
from records import record, tail

from gradstore import Store
from gradstore.store import arrays, catalog, database, segment, writer
from gradstore.store.objects import Objects
from gradstore.store.remote import Remote

SEGMENT_BYTES = 6000  # a segment or two each flush


def die(*_: object, **__: object) -> NoReturn:
    """End like a process that the system kills: no handler, no flush, no exit code."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def replace(module: Any, name: str, function: Callable[..., Any]) -> None:
    setattr(module, name, function)


def in_the_middle_of_an_array() -> None:
    pieces = arrays._shard_pieces

    def half(data: Any, *rest: Any) -> Iterator[bytes | memoryview]:
        for piece in pieces(data, *rest):
            if data.ndim == 2:
                yield memoryview(piece)[: len(piece) // 2]
                die()
            yield piece

    replace(arrays, "_shard_pieces", half)


def after_the_rename() -> None:
    write = segment.write_segment
    replace(writer, "write_segment", lambda *a, **k: die(write(*a, **k)))


def after_commit_before_checkpoint() -> None:
    open_catalog = database.open_file

    class Mortal:
        """A connection that dies between COMMIT and CHECKPOINT: rows are in the WAL only."""

        def __init__(self, connection: Any) -> None:
            self._connection = connection

        def __getattr__(self, name: str) -> Any:
            return getattr(self._connection, name)

        def execute(self, sql: str, *rest: Any) -> Any:
            return die() if sql == "CHECKPOINT" else self._connection.execute(sql, *rest)

    @contextmanager
    def mortal(path: Path, *, read_only: bool) -> Iterator[Any]:
        with open_catalog(path, read_only=read_only) as connection:
            yield Mortal(connection)

    replace(database, "open_file", mortal)


POINTS: dict[str, Callable[[], None]] = {
    "in the middle of an array": in_the_middle_of_an_array,
    "before the manifest": lambda: replace(segment, "sync_tree", die),
    "before the rename": lambda: replace(segment, "replace_durably", die),
    "after the rename": after_the_rename,
    "inside the transaction": lambda: replace(catalog, "_insert_by_id", die),
    "after commit, before checkpoint": after_commit_before_checkpoint,
    "after checkpoint, before publishing": lambda: replace(catalog, "publish", die),
    "before the snapshot's rename": lambda: replace(catalog, "replace_durably", die),
    "after the snapshot's rename": lambda: replace(catalog, "sync_folder", die),
}


def in_the_middle_of_sending() -> None:
    def half(objects: Any, file: Path, name: str) -> None:
        assert objects.folder is not None
        (objects.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (objects.folder / name).write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        die()

    replace(Objects, "put", half)


def before_the_manifest_is_sent() -> None:
    put = Objects.put

    def but_one(objects: Any, file: Path, name: str) -> None:
        die() if file.name == "manifest.json" else put(objects, file, name)

    replace(Objects, "put", but_one)


SENDING: dict[str, Callable[[], None]] = {  # of segments that lie elsewhere
    "in the middle of sending": in_the_middle_of_sending,
    "before the manifest is sent": before_the_manifest_is_sent,
    "after sending": lambda: replace(Remote, "evict", die),
}


def say(*words: str) -> None:
    os.write(1, (" ".join(words) + "\n").encode())  # one write: whole lines, whoever else writes


def write_for_ever(root: Path, rank: int, prefix: str, point: str | None) -> None:
    """Append records of this prefix, acknowledging what is durable."""
    writer.SEGMENT_BYTES = SEGMENT_BYTES
    store = Store.open(root)
    into = writer.SegmentWriter(store, store.run(), rank)
    shared = tail()
    if point is not None:
        (POINTS | SENDING)[point]()
    for n in count():
        ids = [f"{prefix}-{n}-{i}" for i in range(4)]
        for id in ids:
            into.put([record(id, tail=shared)])
        into.flush()
        say("ack", *ids)
        if point is not None and n == 3:
            raise AssertionError(f"still alive: the point {point!r} was never reached")


def fork(*arguments: Any) -> int:
    """Run write_for_ever in a child; returns its pid."""
    if child := os.fork():
        return child
    try:
        write_for_ever(*arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def main(root: Path) -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        point = order.get("point")
        children = [fork(root, int(r), prefix, point) for r, prefix in order["writers"].items()]
        if point is None:
            time.sleep(order["after"])
            for child in children:
                os.kill(child, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        say("dead", *map(str, codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
