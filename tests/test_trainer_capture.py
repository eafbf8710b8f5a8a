"""Captured inside ``transformers.Trainer``: the gradients of one-sample-at-a-time autograd."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    EXACT,
    IGNORED,
    PEAK,
    Alone,
    Gradients,
    alone,
    captured_weights,
    differences,
    records,
    relative,
    rows,
    samples,
    snapshot,
    tiny,
    train,
)

from gradstore import GradStoreCallback, Store
from gradstore.store.record import Record


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
    tokens = samples(12)
    labels = {sample: own.clone() for sample, own in tokens.items()}
    for n, own in enumerate(labels.values()):
        own[: min(n % 4, len(own) - 1)] = IGNORED
    data = [row | {"labels": labels[row["id"]], "note": "dropped"} for row in rows(tokens)]
    witness, _ = train(
        tiny("llama"),
        data,
        GradStoreCallback(store, **EXACT),
        tmp_path,
        side=side,
        gradient_accumulation_steps=2,
    )
    found = records(store)
    assert found.keys() == tokens.keys()
    for sample, [record] in found.items():
        before = witness.before[record.exposure.step]
        truth = alone(tiny("llama"), before, tokens[sample], labels[sample])
        assert max(differences(store, record, truth).values()) <= 1e-5
        assert record.scored.tolist() == (labels[sample][1:] != IGNORED).tolist()
        assert record.exposure.scored_tokens == truth.counted
        assert record.exposure.loss == pytest.approx(truth.loss, rel=1e-5)


def test_bfloat16_training_is_within_two_percent(store: Store, tmp_path: Path) -> None:
    def model() -> Any:
        return tiny("neox", tied=False, initializer_range=0.1)

    tokens = samples(6)
    callback = GradStoreCallback(store, **EXACT)
    witness, _ = train(model(), rows(tokens), callback, tmp_path, bf16=True)
    for sample, [record] in records(store).items():
        truth = alone(model(), witness.before[record.exposure.step], tokens[sample])
        assert max(differences(store, record, truth).values()) <= 2e-2


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
    twice = {(layer, when) for layer in weights for when in ("first-epoch", "end")}
    assert set(kept) - {("embedding", "start"), ("head", "start")} == twice
    for moment, epoch in (("first-epoch", 1), ("end", 3)):
        for layer in weights:
            found = store.moments(run["run_id"], layer, moment)
            assert found is not None
            assert torch.equal(found[0], witness.moments[epoch][layer])
            assert found[1] == 2 * epoch
    assert (run["optimizer"], run["beta1"], run["beta2"]) == ("AdamW", 0.9, 0.9)
    assert (run["epsilon"], run["weight_decay"]) == (1e-8, 0.0)
    assert trainer.state.global_step == run["steps"] == 6


@pytest.mark.parametrize(("optimizer", "name"), [("sgd", "SGD"), ("adafactor", "Adafactor")])
def test_an_optimizer_without_second_moments(
    optimizer: str, name: str, store: Store, tmp_path: Path
) -> None:
    train(tiny(), rows(samples(6)), GradStoreCallback(store), tmp_path, optim=optimizer)
    assert store.rows("SELECT layer, moment FROM moments") == [("embedding", "start")]
    run = store.run()
    assert (run["optimizer"], run["beta1"], run["beta2"]) == (name, None, None)
    assert (run["epsilon"], run["weight_decay"]) == (None, 0.0)


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
    kept = store.tokens(list(numbers.values()), 1)
    assert all(torch.equal(kept[numbers[sample]], own) for sample, own in holdout.items())
    assert store.rows("SELECT count(*) FROM samples WHERE split = 'holdout'") == [(4,)]
    assert model.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tied", "sides"), [(True, "both"), (True, "input"), (False, "both")])
def test_the_recorded_relative_error_is_the_true_one(
    tied: bool, sides: str, dtype: str, tmp_path: Path
) -> None:
    store = Store.create(tmp_path / "store", dtype=dtype)
    tokens = samples(8, longest=20)
    witness, _ = train(
        tiny(tied=tied, vocab_size=400),
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
        fresh = tiny(tied=tied, vocab_size=400)
        truth = alone(fresh, witness.before[fact.step], tokens[sample])
        wrong = squares = 0.0
        for layer in ("embedding",) if tied else ("embedding", "head"):
            found = record.gradient(store.model, layer).dense()
            wrong += float((found - truth.gradients[layer]).norm() ** 2)
            squares += float(truth.gradients[layer].norm() ** 2)
        assert fact.relative_error == pytest.approx((wrong / squares) ** 0.5, rel=1e-2)
        assert fact.relative_error > 1e-3
    assert measured == 1
