"""What cannot be captured is refused with an error that says what to do, and nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    EXACT,
    IGNORED,
    Batch,
    alone,
    batch_of,
    collate,
    differences,
    records,
    rows,
    samples,
    sgd,
    snapshot,
    take_step,
    tiny,
    train,
)
from torch.nn.functional import cross_entropy

import gradstore
from gradstore import GradStoreCallback, Store
from gradstore.capture.collator import IdCollator
from gradstore.capture.recorder import Recorder
from gradstore.errors import CaptureError, GradstoreError, ModelError


def refused(store: Store, model: Any, batch: Batch, message: str, **options: Any) -> None:
    """Capturing ``batch`` ends with an error that says ``message`` and leaves a failed run."""
    optimizer = sgd(model)
    with (
        pytest.raises(CaptureError, match=message),
        gradstore.capture(model, store, optimizer, **options),
    ):
        take_step(model, optimizer, batch)
    assert store.run()["status"] == "failed"
    assert records(store) == {}


def test_a_frozen_embedding(store: Store) -> None:
    model = tiny(tied=False)
    model.get_input_embeddings().weight.requires_grad_(False)
    model.transformer.wpe.weight.requires_grad_(False)
    refused(store, model, batch_of(samples(2)), "unfreeze `model.get_input_embeddings")


def test_no_ids(store: Store) -> None:
    batch = batch_of(samples(2))
    del batch["sample_ids"]
    refused(store, model := tiny(), batch, "no gradient had arrived: pass the samples' ids")
    assert torch.equal(model.lm_head.weight, tiny().lm_head.weight)  # found out at the first step


def test_epochs_that_are_never_reached(store: Store) -> None:
    batch, message = batch_of(samples(2)), r"no optimizer step .* \(epochs_captured='4-5'\)"
    refused(store, tiny(), batch, message, epochs_captured="4-5")


def test_no_optimizer_step(store: Store) -> None:
    model = tiny()
    with (
        pytest.raises(CaptureError, match="no optimizer step was taken"),
        gradstore.capture(model, store, sgd(model)),
    ):
        model(**batch_of(samples(2))).loss.backward()


def test_too_few_ids(store: Store) -> None:
    batch = batch_of(samples(3)) | {"sample_ids": ["a", "b"]}
    refused(store, tiny(), batch, "2 sample ids came with a batch of 3; give one id a row")


def test_labels_other_than_the_inputs(store: Store) -> None:
    batch = batch_of(samples(3))
    batch["labels"] = batch["labels"].roll(1, dims=1)
    refused(store, tiny(), batch, "labels differ from the inputs.* -100 for positions")


def test_padding_in_the_middle(store: Store) -> None:
    batch = batch_of({"whole": torch.arange(2, 8), "torn": torch.arange(20, 26)})
    batch["attention_mask"][1, 2] = 0
    batch["labels"][1, 2:4] = IGNORED
    refused(store, tiny(), batch, "'torn' has padding between its tokens; pad at an end")


def test_an_optimizer_of_another_model(store: Store) -> None:
    model = tiny()
    with pytest.raises(CaptureError, match="make the optimizer from this very model's parameters"):
        Recorder(model, store, sgd(tiny()))
    with gradstore.capture(model, store, optimizer := sgd(model)):  # nothing is left behind
        take_step(model, optimizer, batch_of(samples(2)))
    assert len(records(store)) == 2


def test_a_model_without_a_head(store: Store) -> None:
    body = tiny().transformer
    with pytest.raises(CaptureError, match="load it with AutoModelForCausalLM"):
        Recorder(body, store, sgd(body))
    with pytest.raises(CaptureError, match="captures Hugging Face causal language models"):
        Recorder(torch.nn.Linear(2, 2), store, sgd(torch.nn.Linear(2, 2)))


def test_another_model_than_the_stores(store: Store) -> None:
    model = tiny()
    with gradstore.capture(model, store, optimizer := sgd(model)):
        take_step(model, optimizer, batch_of(samples(2)))
    other = tiny(hidden_size=32)
    with pytest.raises(ModelError, match="width is 32, the store has 16"):
        Recorder(other, store, sgd(other))


def test_sides_that_do_not_exist(store: Store) -> None:
    model = tiny()
    with pytest.raises(ValueError, match="sides is one of auto, input, both, not 'left'"):
        Recorder(model, store, sgd(model), sides="left")


@pytest.mark.parametrize("objective", ["smoothed", "focal", "shifted twice"])
def test_a_loss_that_is_not_next_token_cross_entropy(objective: str, store: Store) -> None:
    model, batch = tiny(), batch_of(samples(3))
    labels, optimizer = batch.pop("labels"), sgd(model)
    ahead = 2 if objective == "shifted twice" else 1
    smoothing = 0.1 if objective == "smoothed" else 0.0

    def fit() -> None:
        with gradstore.capture(model, store, optimizer):
            logits, target = model(**batch).logits[:, :-ahead], labels[:, ahead:]
            nats = cross_entropy(logits.mT, target, reduction="none", label_smoothing=smoothing)
            (nats**2 if objective == "focal" else nats).mean().backward()

    with pytest.raises(CaptureError, match="not the cross-entropy of the next token"):
        fit()
    assert store.run()["status"] == "failed"


def test_divergence_keeps_what_was_captured_before(store: Store) -> None:
    tokens, model = samples(6), tiny()
    before, optimizer = snapshot(model), sgd(model)
    names = list(tokens)
    halves = [batch_of({name: tokens[name] for name in half}) for half in (names[:3], names[3:])]

    def fit() -> None:
        with gradstore.capture(model, store, optimizer, **EXACT):
            take_step(model, optimizer, halves[0])
            with torch.no_grad():
                model.transformer.ln_f.weight.fill_(float("nan"))
            take_step(model, optimizer, halves[1])

    with pytest.raises(CaptureError, match="loss of sample 'sample-3' is NaN: training has div"):
        fit()
    assert store.run()["status"] == "failed"
    assert store.run()["steps"] == 1
    found = records(Store.open(store.root))
    assert list(found) == names[:3]
    for name, [record] in found.items():
        truth = alone(tiny(), before, tokens[name])
        assert max(differences(store, record, truth).values()) <= 1e-5


def test_a_collator_that_finds_no_ids() -> None:
    with pytest.raises(CaptureError, match=r"no column 'key'.*remove_unused_columns=False"):
        IdCollator(collate(), "key")([{"id": "a", "input_ids": torch.arange(3)}])


def test_every_error_is_a_gradstore_error() -> None:
    assert issubclass(CaptureError, GradstoreError)


def test_an_id_column_that_the_trainer_would_drop(store: Store, tmp_path: Path) -> None:
    callback = GradStoreCallback(store)
    with pytest.raises(CaptureError, match=r"set TrainingArguments\(remove_unused_columns=False\)"):
        train(tiny(), rows(samples(3)), callback, tmp_path, remove_unused_columns=True)


def test_a_trainer_whose_collator_drops_the_ids(store: Store, tmp_path: Path) -> None:
    callback = GradStoreCallback(store)
    with pytest.raises(CaptureError, match=r"a Trainer's collator: gradstore\.IdCollator"):
        train(tiny(), rows(samples(3)), callback, tmp_path, collator=collate())
    assert store.run()["status"] == "failed"


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
    with pytest.raises(CaptureError, match=r"diverged\. Lower the learning rate or clip"):
        train(model, rows(tokens), GradStoreCallback(store, **EXACT), tmp_path, **arguments)
    assert store.run()["status"] == "failed"
    found = records(Store.open(store.root))
    assert len(found) == 3  # the first step's
    for sample, [record] in found.items():
        truth = alone(tiny(), before, tokens[sample])
        assert max(differences(store, record, truth).values()) <= 1e-5
