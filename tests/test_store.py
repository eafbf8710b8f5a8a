"""The store as its users meet it: by id and by run."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from records import RUN, assert_all_equal, fill, record, records, stored, tail

from gradstore import Store
from gradstore.errors import (
    IdError,
    ModelError,
    StoreDamaged,
    StoreExists,
    StoreMissing,
    StoreTooNew,
)
from gradstore.store import ModelIdentity, writer
from gradstore.store import store as store_module
from gradstore.store.writer import SegmentWriter

MODEL = ModelIdentity("GPT2LMHeadModel", 500, 16, 16, 64, True, "tokens-a")


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
