"""Captured inside ``transformers.Trainer``: the gradients of one-sample-at-a-time autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    VOCABULARY,
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
from gradstore.capture.taps import embedding_of
from gradstore.errors import CaptureError
from gradstore.evaluate.loss import sample_losses
from gradstore.store.record import Record

EXACT = {"sides": "both", "top_k": VOCABULARY}
Gradients = dict[int, dict[str, Tensor]]  # by step and layer
PEAK = 0.02  # learning rate: the weights move far within an epoch


@dataclass
class Witness(TrainerCallback):  # type: ignore[misc]
    """Notes, for each optimizer step, the weights before it and the gradients it was given."""

    before: dict[int, State] = field(default_factory=dict)
    applied: Gradients = field(default_factory=dict)
    epochs: dict[int, State] = field(default_factory=dict)
    moments: dict[int, Tensor] = field(default_factory=dict)

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
        moment = optimizer.state[embedding_of(model).weight].get("exp_avg_sq")
        if moment is not None:
            self.moments[round(state.epoch)] = moment.clone()


def train(
    model: Any,
    data: Sequence[Mapping[str, Any]],
    callback: GradStoreCallback,
    folder: Path,
    *,
    side: str = "right",
    **arguments: Any,
) -> tuple[Witness, Trainer]:
    """Train with capture."""
    settings = {
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
        callbacks=[callback, witness],
    )
    with callback:
        trainer.train()
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
