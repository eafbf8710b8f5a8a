"""The background writer: what is put arrives, in order, and its errors reach the training."""

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import RUN, assert_all_equal, fill, record, records, stored

from gradstore import Store
from gradstore.errors import (
    StoreError,
    StoreUnwritable,
)
from gradstore.store import segment, writer
from gradstore.store.record import Record
from gradstore.store.writer import SegmentWriter


def within(seconds: float, call: Any) -> bool:
    """Whether ``call()`` returns in time; it goes on in a thread if not."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


@settings(max_examples=8)
@given(sizes=st.lists(st.integers(0, 5), max_size=5), segment_bytes=st.integers(1, 6000))
def test_what_is_put_arrives_in_order(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], segment_bytes: int
) -> None:
    store = Store.create(tmp_path_factory.mktemp("store") / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SEGMENT_BYTES", segment_bytes)
        into = SegmentWriter(store, store.begin_run(RUN))
        want: list[Record] = []
        for size in sizes:
            batch = records(*[f"{len(want) + n}" for n in range(size)])
            into.put(batch)
            want += batch
        into.close()
    assert_all_equal(stored(store), want)
    shutil.rmtree(store.root)


def test_flush_makes_everything_visible(store: Store) -> None:
    into = SegmentWriter(store, store.begin_run(RUN))
    into.put(records("a", "b"))
    into.flush()
    assert_all_equal(stored(Store.open(store.root)), records("a", "b"))
    into.put([])
    assert within(10, into.flush), "nothing was put: there is nothing to wait for"
    into.put(records("c"))
    into.close()
    assert_all_equal(stored(store), records("a", "b", "c"))


def test_a_closed_writer_takes_nothing(store: Store) -> None:
    into = SegmentWriter(store, store.begin_run(RUN))
    into.close()
    assert within(10, into.close), "closing twice is harmless"
    with pytest.raises(StoreError, match="this writer is closed"):
        into.put(records("a"))


def test_abandoning_does_not_wait_for_the_disk(store: Store) -> None:
    run = store.begin_run(RUN)
    into = SegmentWriter(store, run)
    into.put(records("a"))
    into.abandon()
    fill(store, records("b"), run)
    assert_all_equal(stored(store), records("b"))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that writes nothing until the event is set."""
    opened, write = threading.Event(), segment.write_segment

    def slow(*arguments: Any, **options: Any) -> Path:
        assert opened.wait(30)
        return write(*arguments, **options)

    monkeypatch.setattr(writer, "write_segment", slow)
    yield opened
    opened.set()


def test_training_waits_only_when_the_disk_is_far_behind(
    store: Store, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = [record(f"{n}", rows=10) for n in range(40)]
    size = want[0].nbytes
    monkeypatch.setattr(writer, "SEGMENT_BYTES", 3 * size)
    monkeypatch.setattr(writer, "PENDING_BYTES", 10 * size)
    into = SegmentWriter(store, store.begin_run(RUN))
    given_over = []

    def train() -> None:
        for one in want:
            into.put([one])
            given_over.append(one)

    training = threading.Thread(target=train)
    training.start()
    training.join(1)
    assert training.is_alive(), "put waits"
    assert 10 <= len(given_over) <= 13, "a segment is with the thread, the rest is pending"
    gate.set()
    training.join(30)
    assert not training.is_alive()
    into.close()
    assert_all_equal(stored(store), want)


def test_one_record_beyond_all_limits_is_taken(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PENDING_BYTES", 10)
    assert within(10, lambda: fill(store, records("a", rows=500)))
    assert_all_equal(stored(store), records("a", rows=500))


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["put", "flush", "close", "put_state"])
def test_an_error_of_the_thread_stops_the_training(
    store: Store, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    run = store.begin_run(RUN)
    into = SegmentWriter(store, run)
    into.put(records("safe"))
    into.flush()
    with monkeypatch.context() as patch:
        patch.setattr(segment, "write_array", full_disk)
        patch.setattr(writer, "SEGMENT_BYTES", 1)
        into.put(records("lost"))
        into._thread.join(10)
        calls: dict[str, Any] = {
            "put": lambda: into.put(records("more")),
            "flush": into.flush,
            "close": into.close,
            "put_state": lambda: into.put_state("holdout", {}, {}),
        }
        for _ in range(2):
            with pytest.raises(StoreUnwritable, match=r"No space left.*Nothing committed.*is lost"):
                calls[call]()
        with pytest.raises(StoreUnwritable):
            into.close()
    assert_all_equal(stored(Store.open(store.root)), records("safe"))
    fill(store, records("later"), run)
    assert_all_equal(stored(store), records("safe", "later"))
    assert list(store.root.rglob(".tmp-*")) == []


def test_an_error_reaches_a_training_that_waits_for_the_disk(
    store: Store, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "write_array", full_disk)
    monkeypatch.setattr(writer, "SEGMENT_BYTES", 1)
    monkeypatch.setattr(writer, "PENDING_BYTES", 1)
    into = SegmentWriter(store, store.begin_run(RUN))
    for id in ("with-the-thread", "pending"):
        into.put(records(id))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(into.put, records("waits"))
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        gate.set()
        with pytest.raises(StoreUnwritable, match="No space left"):
            waiting.result(30)
    into.abandon()
    assert stored(store) == []


def test_ranks_write_side_by_side_and_rank_0_commits(store: Store) -> None:
    run = store.begin_run(RUN)
    writers = [SegmentWriter(store, run, rank) for rank in (0, 1)]
    writers[1].put(records("one"))
    writers[1].flush()
    assert store.rows("SELECT count(*) FROM exposures") == [(0,)]
    writers[0].put(records("zero", "one"))
    writers[0].flush()
    assert sorted(r.exposure.id for r in stored(store)) == ["one", "zero"]
    for into in writers:
        into.close()
