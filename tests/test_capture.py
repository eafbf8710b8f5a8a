"""What a plain loop captures is what autograd gives, one sample at a time."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    EXACT,
    IGNORED,
    KINDS,
    alone,
    batch_of,
    collate,
    differences,
    records,
    relative,
    samples,
    sgd,
    snapshot,
    take_step,
    tiny,
)
from torch.nn.functional import cross_entropy

import gradstore
from gradstore import Store
from gradstore.capture.taps import decode_ids, encode_ids
from gradstore.errors import CaptureError


@settings(max_examples=12)
@given(
    kind=st.sampled_from(KINDS),
    tied=st.booleans(),
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-3, 1.0, 512.0]),
)
def test_a_loop_captures_what_autograd_gives_one_sample_at_a_time(
    kind: str, tied: bool, sizes: list[int], side: str, seed: int, scale: float
) -> None:
    tokens = samples(sum(sizes), seed)
    names, batches = iter(tokens), []
    for size in sizes:
        batches.append(batch_of({name: tokens[name] for name in islice(names, size)}, side))
    model = tiny(kind, tied=tied, seed=seed)
    optimizer, before = sgd(model), snapshot(model)
    with TemporaryDirectory() as folder:
        store = Store.create(Path(folder) / "store", dtype="float32")
        with gradstore.capture(model, store, optimizer, **EXACT):
            for batch in batches:
                (scale * model(**batch).loss).backward()
            optimizer.step()
        for sample, [record] in records(store).items():
            own = tokens.pop(sample)
            start = record.exposure.position_start if kind == "gpt2" else 0
            truth = alone(tiny(kind, tied=tied), before, own, start=start or 0)
            errors = differences(store, record, truth)
            assert max(errors.values()) <= 1e-5, errors
            assert record.exposure.loss == pytest.approx(truth.loss, rel=1e-5)
    assert not tokens


@pytest.mark.parametrize("changes", [{}, {"word_embed_proj_dim": 8}])
def test_both_sides_of_one_sample_are_the_gradient_of_the_tied_weight(
    changes: dict[str, Any], store: Store
) -> None:
    model = tiny("opt" if changes else "gpt2", **changes)
    optimizer = sgd(model)
    with gradstore.capture(model, store, optimizer, **EXACT):
        loss = model(**batch_of(samples(1))).loss
        loss.backward()
        weight = model.get_input_embeddings().weight
        given = weight.grad.clone()
        optimizer.step()
    [[record]] = records(store).values()
    found = record.gradient(store.model).dense() * record.exposure.batch_share
    assert relative(found, given) <= 1e-6
    assert record.exposure.batch_share == pytest.approx(1 / record.exposure.scored_tokens)
    assert record.exposure.loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_are_not_counted(side: str, store: Store) -> None:
    tokens = samples(5, 3)
    labels = {name: ids.clone() for name, ids in tokens.items()}
    for n, own in enumerate(labels.values()):
        own[: min(n + 1, len(own) - 1)] = IGNORED
    features = [{"input_ids": tokens[name], "labels": labels[name]} for name in tokens]
    model = tiny("llama")
    before, optimizer = snapshot(model), sgd(model)
    with gradstore.capture(model, store, optimizer, **EXACT):
        take_step(model, optimizer, collate(side)(features) | {"sample_ids": list(tokens)})
    for name, [record] in records(store).items():
        truth = alone(tiny("llama"), before, tokens[name], labels[name])
        assert max(differences(store, record, truth).values()) <= 1e-5
        assert record.scored.tolist() == (labels[name][1:] != IGNORED).tolist()
        assert record.exposure.scored_tokens == truth.counted
        assert record.exposure.loss == pytest.approx(truth.loss, rel=1e-5)


def test_a_sample_that_the_loss_does_not_count_is_not_captured(store: Store) -> None:
    model, batch = tiny(), batch_of(samples(3))
    batch["labels"][0] = IGNORED
    optimizer = sgd(model)
    with gradstore.capture(model, store, optimizer):
        take_step(model, optimizer, batch)
    assert records(store).keys() == {"sample-1", "sample-2"}


NARROW = {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
TRANSFORMED: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 3.0, **NARROW},  # and scales its embeddings
    "cohere": {"logit_scale": 0.3, **NARROW},
    "granite": {"logits_scaling": 2.0, "embedding_multiplier": 3.0, **NARROW},
}


@pytest.mark.parametrize("kind", TRANSFORMED)
def test_models_that_transform_their_logits_or_embeddings(kind: str, store: Store) -> None:
    tokens, model = samples(4), tiny(kind, **TRANSFORMED[kind])
    before, optimizer = snapshot(model), sgd(model)
    with gradstore.capture(model, store, optimizer, **EXACT):
        take_step(model, optimizer, batch_of(tokens, "left"))
    for name, [record] in records(store).items():
        truth = alone(tiny(kind, **TRANSFORMED[kind]), before, tokens[name])
        assert max(differences(store, record, truth).values()) <= 1e-5
        assert record.exposure.loss == pytest.approx(truth.loss, rel=1e-5)


def test_a_padding_token_in_a_text_trains_no_row(store: Store) -> None:
    tokens, model = {"a": torch.tensor([9, 5, 9, 5, 7])}, tiny("llama", tied=False, pad_token_id=5)
    before, optimizer = snapshot(model), sgd(model)
    with gradstore.capture(model, store, optimizer, **EXACT):
        take_step(model, optimizer, batch_of(tokens))
    [[record]] = records(store).values()
    truth = alone(tiny("llama", tied=False, pad_token_id=5), before, tokens["a"])
    assert max(differences(store, record, truth).values()) <= 1e-5
    assert not record.gradient(store.model).dense()[5].any()


def test_positions_given_with_the_batch(store: Store) -> None:
    tokens, model = samples(4), tiny("gpt2")
    batch = batch_of(tokens, "left")
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0) + 3
    before, optimizer = snapshot(model), sgd(model)
    with gradstore.capture(model, store, optimizer, **EXACT):
        take_step(model, optimizer, batch)
    for name, [record] in records(store).items():
        assert record.exposure.position_start == 3
        truth = alone(tiny("gpt2"), before, tokens[name], start=3)
        assert max(differences(store, record, truth).values()) <= 1e-5


def test_a_loss_taken_outside_the_model_with_weights_for_its_samples(store: Store) -> None:
    tokens, weights = samples(4, 5), torch.tensor([0.5, 1.0, 2.0, 3.0])
    model = tiny("neox", tied=False)
    before, optimizer = snapshot(model), sgd(model)
    with gradstore.capture(model, store, optimizer, **EXACT):
        batch = batch_of(tokens)
        labels = batch.pop("labels")
        logits = model(**batch).logits
        losses = cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none").sum(1)
        (weights * losses).sum().backward()
        optimizer.step()
    for (name, [record]), weight in zip(records(store).items(), weights, strict=True):
        truth = alone(tiny("neox", tied=False), before, tokens[name])
        assert max(differences(store, record, truth).values()) <= 1e-5
        assert record.exposure.batch_share == pytest.approx(float(weight), rel=1e-5)
        assert record.exposure.loss == pytest.approx(truth.loss, rel=1e-5)


def test_the_first_token_predicted_from_padding_is_no_part_of_a_sample(store: Store) -> None:
    # Stock collators label it, and with padding on the left Transformers' loss counts it.
    tokens, model = samples(3), tiny("llama")
    batch = batch_of(tokens, "left")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    before, optimizer = snapshot(model), sgd(model)
    with gradstore.capture(model, store, optimizer, **EXACT):
        take_step(model, optimizer, batch)
    for name, [record] in records(store).items():
        truth = alone(tiny("llama"), before, tokens[name])
        assert max(differences(store, record, truth).values()) <= 1e-5
        assert record.exposure.scored_tokens == len(tokens[name]) - 1


def test_predictions_that_leave_nothing_to_learn(store: Store) -> None:
    # An answer known by heart: the loss's gradient rounds to 0, or to almost nothing.
    model, tokens = tiny(tied=False), {"known": torch.tensor([5, 7]), "other": torch.tensor([3, 4])}
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight.zero_()
    optimizer = sgd(model, 0.0)
    with gradstore.capture(model, store, optimizer, epochs_captured="all", **EXACT) as recorder:
        for recorder.epoch, logit in enumerate((0.0, 10.0, 25.0, 85.0, 200.0), 1):
            with torch.no_grad():
                model.lm_head.weight[7] = logit / 16
            take_step(model, optimizer, batch_of(tokens))
    found = records(store)
    losses = [record.exposure.loss for record in found["known"]]
    assert losses == pytest.approx([5.0106, 6.743e-3, 0.0, 0.0, 0.0], abs=2e-4)
    shares = [record.exposure.batch_share for record in found["known"]]
    assert shares == pytest.approx([0.5, 0.5, 0.5, 0.0, 0.0], rel=1e-3)
    assert all(record.D.isfinite().all() for record in found["known"])
    assert [r.exposure.batch_share for r in found["other"]] == pytest.approx([0.5] * 5, rel=1e-4)


def test_bfloat16_autocast_is_within_two_percent(tmp_path: Path) -> None:
    tokens = samples(6)
    for kind, tied in (("gpt2", True), ("llama", False)):
        store = Store.create(tmp_path / kind)
        model = tiny(kind, tied=tied, initializer_range=0.1)
        before, optimizer = snapshot(model), sgd(model)
        with gradstore.capture(model, store, optimizer, **EXACT):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch_of(tokens)).loss
            loss.backward()
            optimizer.step()
        for name, [record] in records(store).items():
            assert record.D.dtype is torch.bfloat16
            truth = alone(tiny(kind, tied=tied), before, tokens[name])
            errors = differences(store, record, truth)
            assert max(errors.values()) <= 2e-2, (name, errors)
            assert record.exposure.loss == pytest.approx(truth.loss, rel=1e-2)


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_a_model_may_be_compiled_once_capturing_has_begun(store: Store) -> None:
    tokens, model = samples(3), tiny(num_hidden_layers=1)
    before, optimizer = snapshot(model), sgd(model)
    with gradstore.capture(model, store, optimizer, **EXACT):
        take_step(torch.compile(model, backend="eager"), optimizer, batch_of(tokens))
    for name, [record] in records(store).items():
        truth = alone(tiny(num_hidden_layers=1), before, tokens[name])
        assert max(differences(store, record, truth).values()) <= 1e-5


@pytest.mark.filterwarnings("ignore")
def test_a_model_compiled_before_capturing_is_refused(store: Store) -> None:
    model, batch = tiny(num_hidden_layers=1), batch_of(samples(3))
    torch.compiler.reset()  # or a graph from another test is reused
    compiled: Any = torch.compile(model, backend="eager")
    optimizer = sgd(model)
    compiled(**{name: batch[name] for name in batch if name != "sample_ids"}).loss.backward()
    with (
        pytest.raises(CaptureError, match="start capturing first, then compile"),
        gradstore.capture(model, store, optimizer),
    ):
        take_step(compiled, optimizer, batch)


def test_ids_of_any_kind_travel_with_a_batch() -> None:
    ids = ["a", "ünï-4", "7", "0" * 40]
    assert decode_ids(encode_ids(ids)) == ids
    assert decode_ids(encode_ids([3, "x"])) == ["3", "x"]
    assert decode_ids(torch.tensor([4, 5])) == ["4", "5"]
    assert decode_ids(("p", 6)) == ["p", "6"]
