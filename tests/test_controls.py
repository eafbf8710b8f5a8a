"""Controls: the gradient at the model as it is, and noise in the rows that raw touches."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file
from tiny import Tiny, refused, run

from gradstore import Store, capture
from gradstore.errors import ForgetError
from gradstore.evaluate.loss import log_likelihoods
from gradstore.training.model import load_model
from gradstore.unlearn import controls
from gradstore.unlearn.direction import raw

pytest_plugins = ["tiny"]


# -- log-likelihoods ---------------------------------------------------------------------------


def test_likelihoods_of_all_continuations_add_up_to_one() -> None:
    model = models.tiny()
    start = torch.tensor([5, 9])
    every = [torch.cat([start, torch.tensor([token])]) for token in range(models.VOCABULARY)]
    with torch.no_grad():
        shared, whole = log_likelihoods(model, [start])[0], log_likelihoods(model, every)
    assert float(whole.logsumexp(0)) == pytest.approx(float(shared), abs=1e-5)


def test_padding_does_not_count() -> None:
    model, tokens = models.tiny(), list(models.samples(6).values())
    apart = torch.cat([log_likelihoods(model, [sample]) for sample in tokens])
    assert torch.allclose(log_likelihoods(model, tokens), apart, atol=1e-4)


# -- fresh -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_fresh_is_the_sum_over_samples_of_what_autograd_says(kind: str, tied: bool) -> None:
    model, tokens = models.tiny(kind, tied=tied), list(models.samples(5).values())
    expected = torch.zeros(models.VOCABULARY, 16)
    for sample in tokens:
        log_p = model(input_ids=sample[None]).logits[0, :-1].log_softmax(-1)
        loss = -log_p[torch.arange(len(sample) - 1), sample[1:]].sum()
        model.zero_grad()
        loss.backward()
        expected += model.get_input_embeddings().weight.grad
    model.zero_grad()
    assert models.relative(controls.fresh(model, tokens), expected) < 1e-5
    assert all(weight.grad is None for weight in model.parameters())


def test_fresh_is_taken_without_dropout_and_leaves_the_mode() -> None:
    model, tokens = models.tiny(resid_pdrop=0.5, embd_pdrop=0.5), list(models.samples(3).values())
    expected = controls.fresh(models.tiny(), tokens)
    assert torch.equal(controls.fresh(model.train(), tokens), expected)
    assert model.training
    controls.fresh(model.eval(), tokens)
    assert not model.training


def test_fresh_needs_an_embedding_that_learns() -> None:
    model = models.tiny()
    model.get_input_embeddings().weight.requires_grad_(False)
    with pytest.raises(ForgetError, match="embedding is frozen, .*requires_grad_"):
        controls.fresh(model, list(models.samples(1).values()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_is_the_stored_gradient_where_the_weights_did_not_move(
    dtype: str, tmp_path: Path
) -> None:
    store, model, tokens = (
        Store.create(tmp_path / "s", dtype=dtype),
        models.tiny(),
        models.samples(3),
    )
    steps = models.sgd(model, 0.0)
    with capture(model, store, steps, sides="both", top_k=16) as recorder:
        for _ in recorder.epochs(1):
            model(**models.batch_of(tokens)).loss.backward()
            steps.step()
            steps.zero_grad()
    checked = 0
    for sample, ids in tokens.items():
        [record] = store.records(list(store.resolve([sample]).values()), run_id=1)
        exact, stored = controls.fresh(model, [ids]), record.gradient(store.model).dense()
        if (stated := record.exposure.relative_error) is not None:
            assert 1e-4 < models.relative(stored, exact) == pytest.approx(stated, rel=0.05)
            checked += 1
    assert checked


# -- random ------------------------------------------------------------------------------------


def test_random_touches_the_samples_rows_has_the_norm_of_raw_and_is_seeded() -> None:
    tokens, raw = list(models.samples(4).values()), torch.randn(models.VOCABULARY, 16)
    found = controls.random(raw, tokens, seed=3)
    touched = {int(token) for sample in tokens for token in sample[:-1]}
    assert set(found.norm(dim=1).nonzero().flatten().tolist()) == touched
    assert float(found.norm()) == pytest.approx(float(raw.norm()), rel=1e-5)
    assert torch.equal(controls.random(raw, tokens, seed=3), found)
    again = controls.random(raw, tokens, seed=4)
    cosine = float((again * found).sum() / (again.norm() * found.norm()))
    assert abs(cosine) < 4 / (len(touched) * 16) ** 0.5


# -- gradstore forget --direction --------------------------------------------------------------


@pytest.mark.parametrize("direction", ["fresh", "random"])
def test_forget_along_a_control(direction: str, copied: Tiny, tmp_path: Path) -> None:
    run("forget", "p-07", "-s", copied.store, "--model", copied.model, "--out", tmp_path / "out",
        "--direction", direction, "--dose", "target:3.5", "--max-holdout-increase", 99)  # fmt: skip
    store, name = Store.open(copied.store), "transformer.wte.weight"
    [request] = store.table("SELECT direction, dose, verdict FROM requests")
    assert (request["direction"], request["verdict"]) == (direction, "forgotten")
    [score] = store.table("SELECT loss_before, loss_after FROM forgotten")
    assert score["loss_before"] < 3 < score["loss_after"] == pytest.approx(3.5, abs=0.1)
    numbers = list(store.resolve(["p-07"]).values())
    tokens = list(store.tokens(numbers, 1).values())
    if direction == "fresh":
        update = controls.fresh(load_model(copied.model), tokens)
    else:
        first = raw(store, store.run(), numbers)
        update = controls.random(first.update, tokens, seed=0)
    old, new = (
        load_file(folder / "model.safetensors")[name] for folder in (copied.model, tmp_path / "out")
    )
    assert models.relative(new - old, request["dose"] * update) < 1e-3


@pytest.mark.parametrize("direction", ["fresh", "random"])
def test_controls_need_a_target_and_what_was_trained_on(
    direction: str, trained: Tiny, tmp_path: Path
) -> None:
    asked = ["-s", trained.store, "--model", trained.model, "--out", tmp_path / "out",
             "--direction", direction]  # fmt: skip
    said = refused("forget", "p-07", *asked, "--dose", 0.5, code=2)
    assert said.startswith(f"--direction {direction} has no natural scale")
    assert said.endswith("give --dose target or --dose target:NATS")
    assert "'h-01' has no gradient in run-1" in refused("forget", "h-01", *asked)
