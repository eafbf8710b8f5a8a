"""Captured inside ``transformers.Trainer``: the gradients of one-sample-at-a-time autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from models import (
    EXACT,
    IGNORED,
    Alone,
    State,
    alone,
    captured_weights,
    collate,
    differences,
    records,
    relative,
    samples,
    snapshot,
    tiny,
)
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from gradstore import GradStoreCallback, IdCollator, Store
from gradstore.errors import CaptureError
from gradstore.store.record import Layer, Record

Gradients = dict[int, dict[str, Tensor]]  # by step and layer
PEAK = 0.02  # learning rate: the weights move far within an epoch


@dataclass
class Witness(TrainerCallback):
    """Notes, for each optimizer step, the weights before it and the gradients it was given."""

    before: dict[int, State] = field(default_factory=dict)
    applied: Gradients = field(default_factory=dict)
    epochs: dict[int, State] = field(default_factory=dict)
    moments: Gradients = field(default_factory=dict)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before[state.global_step + 1] = snapshot(kwargs["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.applied[state.global_step + 1] = {
            layer: weight.grad.clone()
            for layer, weight in captured_weights(kwargs["model"]).items()
            if weight.grad is not None
        }

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.epochs[round(state.epoch)] = snapshot(model)
        self.moments[round(state.epoch)] = {
            layer: optimizer.state[weight]["exp_avg_sq"].clone()
            for layer, weight in captured_weights(model).items()
            if "exp_avg_sq" in optimizer.state[weight]
        }


def train(
    model: Any,
    data: Sequence[Mapping[str, Any]],
    callback: GradStoreCallback,
    folder: Path,
    *,
    side: str = "right",
    resume: bool = False,
    watch: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> tuple[Witness, Trainer]:
    """Train with capture; ``arguments`` are those of ``TrainingArguments``."""
    settings: dict[str, Any] = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 3,
        "learning_rate": PEAK,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "logging_strategy": "steps",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    witness = Witness()
    trainer = Trainer(
        model,
        TrainingArguments(str(folder / "out"), **settings | arguments),
        data_collator=IdCollator(collate(side)),
        train_dataset=list(data),
        callbacks=[callback, witness, *watch],
    )
    with callback:
        trainer.train(resume_from_checkpoint=resume or None)
    return witness, trainer


def rows(tokens: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    return [{"id": sample, "input_ids": ids} for sample, ids in tokens.items()]


def rebuilt(found: Mapping[str, list[Record]], truths: Mapping[str, Alone]) -> Gradients:
    """Each step's gradients as the optimizer met them: samples' own ones by their shares."""
    sums: Gradients = {}
    for sample, [record] in found.items():
        fact, sample_sums = record.exposure, sums.setdefault(record.exposure.step, {})
        for layer, gradient in truths[sample].gradients.items():
            share = fact.batch_share * fact.grad_scale * gradient
            sample_sums[layer] = sample_sums[layer] + share if layer in sample_sums else share
    return sums


# model, tied, batch size, accumulation, padding, checkpointing, clipping
SWEEP = [
    ("gpt2", True, 1, 4, "right", False, 0.0),
    ("gpt2", True, 5, 1, "left", True, 0.5),
    ("gpt2", False, 2, 3, "left", False, 0.5),
    ("gpt2", False, 7, 1, "right", True, 0.0),
    ("llama", True, 2, 2, "left", True, 0.0),
    ("llama", True, 6, 1, "right", False, 0.5),
    ("llama", False, 3, 2, "right", True, 0.5),
    ("llama", False, 8, 1, "left", False, 0.0),
    ("neox", True, 3, 1, "right", True, 0.5),
    ("neox", True, 1, 3, "left", False, 0.0),
    ("neox", False, 4, 2, "left", True, 0.0),
    ("neox", False, 2, 4, "right", False, 0.5),
    ("opt", True, 4, 1, "left", False, 0.5),
    ("opt", True, 3, 3, "right", True, 0.0),
    ("opt", False, 1, 2, "right", False, 0.5),
    ("opt", False, 5, 2, "left", True, 0.0),
]


@pytest.mark.parametrize(
    ("kind", "tied", "batch", "accumulation", "side", "checkpointing", "clip"), SWEEP
)
def test_captured_is_what_autograd_gives_one_sample_at_a_time(
    kind: str,
    tied: bool,
    batch: int,
    accumulation: int,
    side: str,
    checkpointing: bool,
    clip: float,
    store: Store,
    tmp_path: Path,
) -> None:
    tokens = samples(2 * batch * accumulation + 1)  # three steps, the last one not full
    witness, trainer = train(
        tiny(kind, tied=tied),
        rows(tokens),
        GradStoreCallback(store, **EXACT),
        tmp_path,
        side=side,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        activation_checkpointing=checkpointing,
        max_grad_norm=clip,
    )
    found = records(store)
    assert found.keys() == tokens.keys()
    truths: dict[str, Alone] = {}
    for sample, [record] in found.items():
        fact, own = record.exposure, tokens[sample]
        start = fact.position_start if kind == "gpt2" else 0  # there, padding takes up positions
        fresh = tiny(kind, tied=tied)
        truths[sample] = truth = alone(fresh, witness.before[fact.step], own, start=start or 0)
        errors = differences(store, record, truth)
        assert max(errors.values()) <= 1e-5, errors
        assert torch.equal(record.tokens, own)
        assert fact.loss == pytest.approx(truth.loss, rel=1e-5)
        assert fact.scored_tokens == truth.counted == len(own) - 1
        assert fact.learning_rate == pytest.approx(PEAK * (1 - (fact.step - 1) / 3))
        assert fact.epoch == 1
        norm = trainer.state.log_history[fact.step - 1]["grad_norm"]  # before clipping
        expected = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        assert fact.grad_scale == pytest.approx(expected, rel=1e-5)
    sums = rebuilt(found, truths)
    assert sums.keys() == {1, 2, 3}
    for step, given in witness.applied.items():
        assert given.keys() == truths["sample-0"].gradients.keys() - {"input"}
        for layer, gradient in given.items():
            assert relative(sums[step][layer], gradient) <= 2e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_are_not_counted(side: str, store: Store, tmp_path: Path) -> None:
    tokens, data = samples(12), []
    for n, (sample, own) in enumerate(tokens.items()):
        prompt = min(n % 4, len(own) - 2)
        labels = torch.cat([torch.full((prompt,), IGNORED), own[prompt:]])
        data.append({"id": sample, "input_ids": own, "labels": labels, "note": "left out"})
    witness, _ = train(
        tiny("llama"),
        data,
        GradStoreCallback(store, **EXACT),
        tmp_path,
        side=side,
        gradient_accumulation_steps=2,
    )
    found = records(store)
    for row in data:
        [record], labels = found[row["id"]], row["labels"]
        before = witness.before[record.exposure.step]
        truth = alone(tiny("llama"), before, tokens[row["id"]], labels)
        assert max(differences(store, record, truth).values()) <= 1e-5
        assert record.scored.tolist() == (labels[1:] != IGNORED).tolist()
        assert record.exposure.scored_tokens == truth.counted
        assert record.exposure.loss == pytest.approx(truth.loss, rel=1e-5)


def test_bfloat16_training_is_within_two_percent(store: Store, tmp_path: Path) -> None:
    tokens, kind = samples(6), {"kind": "neox", "tied": False, "initializer_range": 0.1}
    witness, _ = train(
        tiny(**kind), rows(tokens), GradStoreCallback(store, **EXACT), tmp_path, bf16=True
    )
    for sample, [record] in records(store).items():
        truth = alone(tiny(**kind), witness.before[record.exposure.step], tokens[sample])
        assert max(differences(store, record, truth).values()) <= 2e-2


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


@pytest.mark.parametrize(("kind", "tied"), [("gpt2", True), ("neox", False), ("opt", False)])
def test_adams_second_moments_are_kept_twice(
    kind: str, tied: bool, store: Store, tmp_path: Path
) -> None:
    model = tiny(kind, tied=tied)
    callback = GradStoreCallback(store, sides="both")
    witness, trainer = train(
        model, rows(samples(6)), callback, tmp_path, num_train_epochs=3, adam_beta2=0.9
    )
    weights = captured_weights(model)
    run = store.run()
    kept = store.rows("SELECT layer, moment FROM moments WHERE run_id = ?", [run["run_id"]])
    assert set(kept) == {(layer, when) for layer in weights for when in ("first-epoch", "end")}
    for moment, epoch in (("first-epoch", 1), ("end", 3)):
        for layer in weights:
            found = store.moments(run["run_id"], layer, moment)
            assert found is not None
            assert torch.equal(found[0], witness.moments[epoch][layer])
            assert found[1] == 2 * epoch
    assert (run["optimizer"], run["beta1"], run["beta2"]) == ("AdamW", 0.9, 0.9)
    assert (run["epsilon"], run["weight_decay"]) == (1e-8, 0.0)
    assert trainer.state.global_step == run["steps"] == 6


def test_an_optimizer_without_second_moments(store: Store, tmp_path: Path) -> None:
    train(tiny(), rows(samples(6)), GradStoreCallback(store), tmp_path, optim="sgd")
    assert store.rows("SELECT * FROM moments") == []
    run = store.run()
    assert (run["optimizer"], run["beta1"], run["beta2"]) == ("SGD", None, None)


def test_held_out_losses_of_every_epoch(store: Store, tmp_path: Path) -> None:
    model, holdout = tiny("opt"), {f"out-{i}": own for i, own in enumerate(samples(4, 7).values())}
    initial = snapshot(model)
    callback = GradStoreCallback(store, holdout=holdout)
    witness, _ = train(model, rows(samples(6)), callback, tmp_path, num_train_epochs=2)
    states = {0: initial, **witness.epochs}
    found = store.rows(
        "SELECT id, epoch, step, loss FROM holdout_losses JOIN samples USING (sample_id)"
    )
    assert len(found) == 12
    for sample, epoch, step, loss in found:
        truth = alone(tiny("opt"), states[epoch], holdout[sample])
        assert loss == pytest.approx(truth.loss, rel=1e-5)
        assert step == 2 * epoch
    numbers = store.resolve(holdout)
    kept = store.tokens(list(numbers.values()))
    assert all(torch.equal(kept[numbers[sample]], own) for sample, own in holdout.items())
    assert store.rows("SELECT count(*) FROM samples WHERE split = 'holdout'") == [(4,)]
    assert model.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tied", "sides"), [(True, "both"), (True, "input"), (False, "both")])
def test_the_recorded_relative_error_is_the_true_one(
    tied: bool, sides: str, dtype: str, tmp_path: Path
) -> None:
    store = Store.create(tmp_path / "store", dtype=dtype)
    tokens, shape = samples(8, longest=20), {"tied": tied, "vocab_size": 400}
    witness, _ = train(
        tiny(**shape),
        rows(tokens),
        GradStoreCallback(store, sides=sides),
        tmp_path,
        per_device_train_batch_size=8,
    )
    measured = 0
    for sample, [record] in records(store).items():
        fact = record.exposure
        if fact.relative_error is None:
            continue
        measured += 1
        truth = alone(tiny(**shape), witness.before[fact.step], tokens[sample])
        wrong = squares = 0.0
        for layer in ("embedding",) if tied else ("embedding", "head"):
            found = record.gradient(store.model, cast(Layer, layer)).dense()
            wrong += float((found - truth.gradients[layer]).norm() ** 2)
            squares += float(truth.gradients[layer].norm() ** 2)
        assert fact.relative_error == pytest.approx((wrong / squares) ** 0.5, rel=1e-2)
        assert fact.relative_error > 1e-3
    assert measured == 1


# -- what goes wrong -------------------------------------------------------------------------------


def test_an_id_column_that_the_trainer_would_drop(store: Store, tmp_path: Path) -> None:
    callback = GradStoreCallback(store)
    with pytest.raises(CaptureError, match=r"set TrainingArguments\(remove_unused_columns=False\)"):
        train(tiny(), rows(samples(3)), callback, tmp_path, remove_unused_columns=True)


def test_label_smoothing(store: Store, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="label smoothing, another objective"):
        train(
            tiny(),
            rows(samples(3)),
            GradStoreCallback(store),
            tmp_path,
            label_smoothing_factor=0.1,
        )
    assert store.run()["status"] == "failed"


def test_a_training_that_diverges_keeps_what_it_captured(store: Store, tmp_path: Path) -> None:
    tokens, model = samples(9), tiny()
    before = snapshot(model)
    arguments: dict[str, Any] = {"optim": "sgd", "learning_rate": 1e30}
    with pytest.raises(
        CaptureError, match="is NaN: training has diverged. Lower the learning rate"
    ):
        train(model, rows(tokens), GradStoreCallback(store, **EXACT), tmp_path, **arguments)
    assert store.run()["status"] == "failed"
    found = records(Store.open(store.root))
    assert len(found) == 3  # the first step's
    for sample, [record] in found.items():
        truth = alone(tiny(), before, tokens[sample])
        assert max(differences(store, record, truth).values()) <= 1e-5
