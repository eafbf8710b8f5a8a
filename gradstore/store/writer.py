"""The background writer: training hands records over and goes on; a thread makes them durable."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from gradstore.errors import StoreBusy, StoreError
from gradstore.store import catalog, remote
from gradstore.store.files import make_folder, sync_folder, unlinked, writing
from gradstore.store.manifest import read_manifest
from gradstore.store.record import Record
from gradstore.store.segment import (
    Arrays,
    Tables,
    collect_garbage,
    pack,
    write_segment,
)
from gradstore.store.store import Store
from gradstore.upkeep.recovery import send_rest

SEGMENT_BYTES = 64 << 20  # best throughput measured: one fsync and one commit for each
SENDING_SECONDS = 120  # to wait for a reader that sends what a killed writer had finished
PENDING_BYTES = 256 << 20  # what training may be ahead of the disk, before it waits


class SegmentWriter:
    """Writes records into segments of about 64 MB and commits each with one transaction.

    ``put`` returns at once unless the disk is more than 256 MB behind, then it waits. An error in
    the thread is raised by the next call here, so that training stops with it. ``flush`` returns
    when everything handed over is durable and visible. Only rank 0 commits; other ranks' segments
    are entered when rank 0 flushes.

    ``run`` is a row of ``runs``, or what begins one once the rank's lock is held. Raises
    :class:`StoreBusy` if another process writes the same rank's segments.
    """

    def __init__(
        self,
        store: Store,
        run: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        rank: int = 0,
    ) -> None:
        self._store, self._rank = store, rank
        self._folder = unlinked(store.root / "segments" / f"r{rank}", store.root)
        with writing(self._folder):
            make_folder(self._folder)
            sync_folder(self._folder.parent)
        self._held = ExitStack()
        seconds = 0 if store.format.elsewhere is None else SENDING_SECONDS
        self._held.enter_context(catalog.lock(self._folder / "lock", seconds, "ingesting into"))
        with ExitStack() as undo:
            undo.push(self._held)
            collect_garbage(self._folder)
            send_rest(store, self._folder)
            self.run = run() if callable(run) else run
            undo.pop_all()
        self._changed = threading.Condition()
        self._pending: deque[Record] = deque()
        self._pending_bytes = 0
        self._busy = self._flushing = self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="gradstore-writer", daemon=True)
        self._thread.start()

    def put(self, records: Sequence[Record]) -> None:
        """Hand records over; waits only while the disk is too far behind."""
        size = sum(record.nbytes for record in records)
        with self._changed:
            self._changed.wait_for(
                lambda: self._error or not self._pending or self._pending_bytes < PENDING_BYTES
            )
            self._raise()
            if self._closing:
                raise StoreError("this writer is closed; open another to add records")
            self._pending.extend(records)
            self._pending_bytes += size
            self._changed.notify_all()

    def put_state(self, kind: str, arrays: Arrays, tables: Tables) -> None:
        """Write a segment without gradients (optimizer moments, held-out tokens and losses)."""
        self.flush()
        self._write(kind, arrays, tables)
        self._store.refresh()

    def flush(self) -> None:
        """Wait until all that was handed over is durable and in the catalog."""
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._error or self._closing or not (self._pending or self._busy)
            )
            self._flushing = False
            self._raise()
        self._store.refresh()
        if self._rank == 0 and not self._store.is_current():  # other ranks have written
            self._store.recover()

    def close(self) -> None:
        """Flush, stop the thread and let the lock go; raises the thread's error if it had one."""
        try:
            self.flush()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Stop without waiting for what is pending (training failed)."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._held.close()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while (batch := self._take()) is not None:
                arrays, tables = pack(batch)
                self._write("gradients", arrays, tables)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _take(self) -> list[Record] | None:
        """Wait for the records of the next segment; None when closing."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: (
                    self._closing
                    or (self._pending and (self._flushing or self._pending_bytes >= SEGMENT_BYTES))
                )
            )
            if self._closing:
                return None
            batch, size = [], 0
            while self._pending and size < SEGMENT_BYTES:
                batch.append(self._pending.popleft())
                size += batch[-1].nbytes
            self._pending_bytes -= size
            self._busy = True
            self._changed.notify_all()
            return batch

    def _write(self, kind: str, arrays: Arrays, tables: Tables) -> None:
        path = write_segment(
            self._folder,
            run=self.run,
            kind=kind,
            profile=self._store.format.profile,
            arrays=arrays,
            tables=tables,
            digest=self._store.format.file_digest,
        )
        remote.send(self._store.root, path)
        if self._rank == 0:
            name = path.relative_to(self._store.root).as_posix()
            with suppress(StoreBusy), catalog.transaction(self._store.root) as connection:
                # durable already: if another process is busy here, flush or the next open enters it
                catalog.commit_segment(connection, name, read_manifest(path))
