"""The store as its users meet it: by id, by run, and through the background writer."""

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from records import RUN, assert_all_equal, record, records, tail

from gradstore import Store
from gradstore.errors import (
    IdError,
    ModelError,
    StoreDamaged,
    StoreError,
    StoreExists,
    StoreMissing,
    StoreTooNew,
    StoreUnwritable,
)
from gradstore.store import ModelIdentity, segment, writer
from gradstore.store import store as store_module
from gradstore.store.record import Record
from gradstore.store.writer import SegmentWriter

MODEL = ModelIdentity("GPT2LMHeadModel", 500, 16, 16, 64, True, "tokens-a")


def fill(store: Store, batch: list[Record], run: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write records into a run; returns the run."""
    run = store.begin_run(RUN) if run is None else run
    into = SegmentWriter(store, run)
    into.put(batch)
    into.close()
    return run


def stored(store: Store, run_id: int = 1) -> list[Record]:
    """All records of a run, by sample and epoch."""
    numbers = [n for (n,) in store.rows("SELECT sample_id FROM samples ORDER BY sample_id")]
    return list(store.records(numbers, run_id))


def within(seconds: float, call: Any) -> bool:
    """Whether ``call()`` returns in time; it goes on in a thread if not."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


# -- what is a store -----------------------------------------------------------------------------


def test_create_and_open(tmp_path: Path) -> None:
    created = Store.create(tmp_path / "new" / "store", profile="raw", dtype="float32")
    opened = Store.open(tmp_path / "new" / "store")
    assert opened.format == created.format
    assert (opened.format.profile, opened.format.dtype) == ("raw", "float32")
    (tmp_path / "empty").mkdir()
    assert Store.open_or_create(tmp_path / "empty").format.profile == "packed"
    assert Store.open_or_create(opened) is opened


def test_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreMissing, match=r"no store at .*; create one with `gradstore init"):
            Store.open(path)


def test_nothing_is_created_over_something(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreExists, match="already holds a store"):
        Store.create(store.root)
    with pytest.raises(StoreExists, match="already holds something else"):
        Store.create(tmp_path)
    with pytest.raises(ValueError, match="profile is one of"):
        Store.create(tmp_path / "other", profile="tiny")


def test_a_newer_format_is_refused(store: Store) -> None:
    path = store.root / "gradstore.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    with pytest.raises(StoreTooNew, match=r"has format 3; .* reads up to 2\. Upgrade with"):
        Store.open(store.root)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"format": "x"}', '{"format": 1}'])
def test_a_damaged_description(store: Store, content: str) -> None:
    (store.root / "gradstore.json").write_text(content)
    with pytest.raises(StoreDamaged, match=r"gradstore\.json"):
        Store.open(store.root)


# -- models --------------------------------------------------------------------------------------


def test_a_store_is_bound_to_one_model(store: Store) -> None:
    with pytest.raises(StoreMissing, match="is empty; fill it"):
        _ = store.model
    store.bind(MODEL, "first")
    store.bind(replace(MODEL, tokenizer=None), "the same, its tokenizer not at hand")
    reopened = Store.open(store.root)
    assert reopened.model == MODEL
    with pytest.raises(
        ModelError, match=r"^ckpt is another model .* width is 32, the store has 16"
    ):
        reopened.bind(replace(MODEL, width=32), "ckpt")
    assert Store.open(store.root).model == MODEL


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "LlamaForCausalLM"),
        ("vocabulary", 501),
        ("width", 8),
        ("head_width", 8),
        ("positions", None),
        ("tied", False),
        ("tokenizer", "tokens-b"),
    ],
)
def test_every_difference_between_models_is_named(field: str, value: object) -> None:
    other = replace(MODEL, **{field: value})  # type: ignore[arg-type]
    pattern = rf"{field} is {value}, the store has {getattr(MODEL, field)}\. Give the checkpoint"
    with pytest.raises(ModelError, match=pattern):
        MODEL.check(other, "ckpt")


# -- ids and runs --------------------------------------------------------------------------------


def test_resolve(store: Store) -> None:
    fill(store, records("ann", "anna", "annabel", "bob", "ANN", "100%"))
    assert store.resolve(["bob", "ann"]) == {"bob": 4, "ann": 1}
    assert list(store.resolve(["bob", "ann"])) == ["bob", "ann"]
    assert store.resolve(["anna"]) == {"anna": 2}, "exact beats prefix"
    assert store.resolve(["b", "annab", "10"]) == {"bob": 4, "annabel": 3, "100%": 6}
    assert store.resolve([]) == {}
    with pytest.raises(IdError, match=r"'an' is the beginning of several ids \(ann, anna, annabel"):
        store.resolve(["bob", "an"])
    for unknown in ("zoe", "annabella", "%", "_nn", "", "ann "):
        with pytest.raises(IdError, match=rf"no sample has the id '{unknown}'; list them"):
            store.resolve([unknown])


def test_runs_by_name_and_number(store: Store) -> None:
    with store.transaction():
        pass
    with pytest.raises(IdError, match="the store has no run; it has: none yet"):
        store.run()
    store.begin_run(RUN)
    store.begin_run({**RUN, "name": "careful"})
    assert [store.run(name)["run_id"] for name in (None, "run-1", 1, "1", "careful", 2)] == [
        2, 1, 1, 1, 2, 2,
    ]  # fmt: skip
    store.update_run(1, status="finished", steps=7)
    assert (store.run(1)["steps"], store.run(1)["finished_at"] is None) == (7, False)
    assert store.run(2)["status"] == "running"
    with pytest.raises(IdError, match="no run '3'; it has: run-1, careful"):
        store.run(3)


def test_records_of_a_sample_over_epochs_and_runs(store: Store) -> None:
    epochs = [record(id, epoch=epoch) for epoch in (2, 1, 3) for id in ("a", "b")]
    run = fill(store, epochs)
    fill(store, records("b"), store.begin_run(RUN))
    b, a = store.resolve(["b", "a"]).values()
    found = list(store.records([b, a], run["run_id"]))
    assert_all_equal(found, [record(id, epoch=n) for id in ("b", "a") for n in (1, 2, 3)])
    assert_all_equal(list(store.records([b, a], 2)), records("b"))
    assert list(store.records([], 1)) == []
    assert list(store.records([99], 1)) == []


def test_both_sides_in_every_profile_and_type(tmp_path: Path) -> None:
    shared = tail()
    for profile in ("packed", "raw"):
        for dtype in (torch.bfloat16, torch.float32):
            want = records("a", "b", "c", tail=shared, dtype=dtype)
            path = tmp_path / f"{profile}-{str(dtype)[6:]}"
            store = Store.create(path, profile=profile, dtype=str(dtype)[6:])
            fill(store, want)
            assert_all_equal(stored(Store.open(path)), want)


def test_tokens_of_training_and_held_out_samples(store: Store) -> None:
    run = fill(store, [record("a"), record("a", epoch=2), record("b")])
    into = SegmentWriter(store, run)
    table: dict[str, list[Any]] = {"id": ["h", "i"], "token_start": [0, 3], "tokens": [3, 2]}
    into.put_state("holdout", {"tokens": torch.tensor([7, 8, 9, 70_000, 5])}, {"holdout": table})
    into.close()
    numbers = store.resolve(["a", "b", "h", "i"])
    found = {id: store.tokens(list(numbers.values()), 1)[n].tolist() for id, n in numbers.items()}
    expected = {id: record(id).tokens.tolist() for id in ("a", "b")}
    assert found == expected | {"h": [7, 8, 9], "i": [70_000, 5]}
    assert store.tokens([99], 1) == store.tokens(list(numbers.values()), 2) == {}


def test_moments(store: Store) -> None:
    into = SegmentWriter(store, store.begin_run(RUN))
    for step, moment in ((10, "first-epoch"), (30, "end")):
        table: dict[str, list[Any]] = {"layer": ["embedding"], "moment": [moment], "step": [step]}
        into.put_state("moments", {"embedding": torch.full((50, 16), step / 8)}, {"moments": table})
    into.close()
    kept = store.moments(1, "embedding", "end")
    assert kept is not None
    assert (kept[1], torch.equal(kept[0], torch.full((50, 16), 3.75))) == (30, True)
    assert store.moments(1, "position", "end") is None
    assert store.moments(2, "embedding", "end") is None


def test_many_segments_need_few_open_files(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "OPEN_SEGMENTS", 2)
    monkeypatch.setattr(writer, "SEGMENT_BYTES", 1)
    want = records(*"abcdefgh")
    fill(store, want)
    assert store.rows("SELECT count(*) FROM segments") == [(8,)]
    before = len(os.listdir("/dev/fd"))
    assert_all_equal(stored(store), want)
    assert len(os.listdir("/dev/fd")) - before <= 2 * 3
    known = [store.segment(number) for number in range(1, 9)]
    assert_all_equal(stored(store), want)  # files are opened again
    assert [store.segment(number) for number in range(1, 9)] == known
    monkeypatch.setattr(store_module, "KNOWN_SEGMENTS", 7)
    assert store.segment(1) is known[0]
    assert store.segment(2) is not known[1]
    shutil.rmtree(store.root / "segments/r0/000003")
    with pytest.raises(StoreDamaged, match=r"000003/D/c\.0\.0 is gone"):
        known[2].tensor("D")


# -- the background writer -----------------------------------------------------------------------


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
