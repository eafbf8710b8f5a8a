"""Which exposures are captured: the scheduled epochs, each once, also across interruptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    EXACT,
    alone,
    batch_of,
    differences,
    epochs_of,
    records,
    rows,
    samples,
    sgd,
    take_step,
    tiny,
    train,
)
from transformers import TrainerCallback

import gradstore
from gradstore import GradStoreCallback, Store
from gradstore.capture.schedule import Schedule


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("first", [1]),
        ("all", [1, 2, 3, 4]),
        ("every:2", [2, 4]),
        ("1,3", [1, 3]),
        ("2-3", [2, 3]),
        ("1, 3-4", [1, 3, 4]),
    ],
)
def test_a_schedule_wants_its_epochs_once(text: str, expected: list[int]) -> None:
    schedule, seen = Schedule.parse(text), set[int]()
    for epoch in (1, 2, 3, 4):
        for _ in range(2):  # the second arrival in an epoch is never wanted
            if schedule.wants(epoch, seen):
                seen.add(epoch)
                assert not schedule.wants(epoch, seen)
    assert sorted(seen) == expected


BAD = ["", "last", "every:0", "every:", "0", "1,,2", "3-", "1;2", "-1", "3-2"]


@pytest.mark.parametrize("text", BAD)
def test_a_schedule_that_names_no_epochs_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="names no epochs; expected first, all, every:N"):
        Schedule.parse(text)


def test_only_the_scheduled_epochs_are_captured_each_once(store: Store) -> None:
    model = tiny()
    optimizer, batch = sgd(model, 1.0), batch_of(samples(2))
    with gradstore.capture(model, store, optimizer, epochs_captured="2-3") as recorder:
        for _ in recorder.epochs(4):
            take_step(model, optimizer, batch, batch)  # both arrive twice
            take_step(model, optimizer, batch)
    assert epochs_of(store) == {"sample-0": [2, 3], "sample-1": [2, 3]}
    steps = [record.exposure.step for record in records(store)["sample-0"]]
    assert steps == [3, 5]
    assert store.run()["steps"] == 8
    assert store.rows("SELECT sum(records) FROM segments") == [(4,)]  # nothing written in vain


def test_first_means_the_first_time_that_a_sample_is_met(store: Store) -> None:
    tokens, model = samples(3), tiny()
    optimizer = sgd(model)
    early = {name: tokens[name] for name in ("sample-0", "sample-2")}
    with gradstore.capture(model, store, optimizer) as recorder:
        for epoch in recorder.epochs(2):
            take_step(model, optimizer, batch_of(early if epoch == 1 else tokens))
    assert epochs_of(store) == {"sample-0": [1], "sample-1": [2], "sample-2": [1]}


def test_one_sample_twice_in_a_batch_is_captured_once(store: Store) -> None:
    model, batch = tiny(), batch_of(samples(3))
    batch["sample_ids"] = ["a", "b", "a"]
    optimizer = sgd(model)
    with gradstore.capture(model, store, optimizer):
        take_step(model, optimizer, batch)
    found = records(store)
    assert {name: len(of) for name, of in found.items()} == {"a": 1, "b": 1}
    assert torch.equal(found["a"][0].tokens, samples(3)["sample-0"])


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("schedule", ["first", "all"])
def test_resuming_captures_nothing_twice(schedule: str, killed: bool, store: Store) -> None:
    tokens, model = samples(3), tiny()
    optimizer = sgd(model)
    first = {"sample-0": tokens["sample-0"]}
    options: dict[str, Any] = {"epochs_captured": schedule, "run": "mine"}

    def interrupted() -> None:
        with gradstore.capture(model, store, optimizer, **options) as recorder:
            for _ in recorder.epochs(2):
                take_step(model, optimizer, batch_of(first))
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert store.run()["status"] == "failed"
    if killed:  # then nobody could write the number of steps down
        store.update_run(store.run()["run_id"], steps=None)
    with gradstore.capture(model, store, optimizer, resume=True, **options) as recorder:
        recorder.epoch = 2
        take_step(model, optimizer, batch_of(tokens), batch_of(first))
        take_step(model, optimizer, batch_of(tokens))
    met = [1] if schedule == "first" else [1, 2]
    assert epochs_of(store) == {"sample-0": met, "sample-1": [2], "sample-2": [2]}
    steps = [record.exposure.step for [record, *_] in records(store).values()]
    assert steps == [1, 2, 2]
    assert store.rows("SELECT sum(records) FROM segments") == [(len(met) + 2,)]
    [run] = store.table("SELECT * FROM runs")
    assert (run["name"], run["status"], run["steps"]) == ("mine", "finished", 3)
    assert store.rows("SELECT step, epoch FROM steps ORDER BY step") == [(1, 1), (2, 2), (3, 2)]


def test_what_was_never_applied_is_never_kept(store: Store) -> None:
    model, tokens = tiny(), samples(4)
    optimizer = sgd(model)
    names = list(tokens)
    with gradstore.capture(model, store, optimizer):
        take_step(model, optimizer, batch_of({names[0]: tokens[names[0]]}))
        model(**batch_of({names[1]: tokens[names[1]]})).loss.backward()  # no step follows
    assert records(store).keys() == {names[0]}


SCHEDULES = {"first": [1], "all": [1, 2, 3], "every:2": [2], "1,3": [1, 3], "2-3": [2, 3]}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scheduled_epochs_hold_the_gradients_of_their_time(
    schedule: str, store: Store, tmp_path: Path
) -> None:
    tokens = samples(6)
    callback = GradStoreCallback(store, epochs_captured=schedule, **EXACT)
    witness, _ = train(tiny(), rows(tokens), callback, tmp_path, num_train_epochs=3)
    found = records(store)
    assert found.keys() == tokens.keys()
    for sample, exposures in found.items():
        assert [record.exposure.epoch for record in exposures] == SCHEDULES[schedule]
        for record in exposures:
            fact = record.exposure
            assert (fact.step + 1) // 2 == fact.epoch  # two steps each
            truth = alone(tiny(), witness.before[fact.step], tokens[sample])
            assert max(differences(store, record, truth).values()) <= 1e-5
    run = store.run()
    assert (run["status"], run["steps"], run["epochs_captured"]) == ("finished", 6, schedule)


class PowerCut(TrainerCallback):
    """Ends the training after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("cut", "saving"), [(3, "epoch"), (5, "steps")])
def test_a_resumed_training_captures_everything_once(
    cut: int, saving: str, store: Store, tmp_path: Path
) -> None:
    # Steps 1-3 are epoch 1; saved after steps 3 and 6, or 2, 4 and 6.
    tokens, options = samples(9), {"epochs_captured": "all", **EXACT}
    settings: dict[str, Any] = {"num_train_epochs": 2, "save_strategy": saving, "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        train(
            tiny(),
            rows(tokens),
            GradStoreCallback(store, **options),
            tmp_path,
            watch=[PowerCut(cut + 1)],
            **settings,
        )
    assert store.run()["status"] == "failed"
    kept = sum(len(exposures) for exposures in records(store).values())
    assert kept == 3 * (cut + 1)
    callback = GradStoreCallback(store, **options)
    witness, _ = train(tiny(), rows(tokens), callback, tmp_path, resume=True, **settings)
    found = records(store)
    assert found.keys() == tokens.keys()
    steps = [record.exposure.step for exposures in found.values() for record in exposures]
    assert sorted(steps) == sorted([1, 2, 3, 4, 5, 6] * 3)
    for sample, exposures in found.items():
        assert [record.exposure.epoch for record in exposures] == [1, 2]
        for record in exposures:
            if (before := witness.before.get(record.exposure.step)) is not None:
                truth = alone(tiny(), before, tokens[sample])
                assert max(differences(store, record, truth).values()) <= 1e-5
    [run] = store.table("SELECT * FROM runs")
    assert (run["status"], run["steps"]) == ("finished", 6)
