"""Scores of membership by gradient and by reference: autograd, closed forms, scikit-learn."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from models import alone, samples, snapshot, tiny
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score
from tiny import Tiny, run_json
from torch import Tensor

from gradstore import Store
from gradstore.evaluate.loss import log_likelihoods, sample_losses
from gradstore.evaluate.membership import above_reference, gradnorms
from gradstore.evaluate.statistics import auc, privleak
from gradstore.training.model import load_model, load_tokenizer

pytest_plugins = ["tiny"]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox", "opt"])
@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_norm_of_autograd_s_gradient_of_the_mean_loss(kind: str, tied: bool) -> None:
    model, tokens = tiny(kind, tied=tied).train(), list(samples(4).values())
    found = gradnorms(model, tokens)
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())
    state = snapshot(model)
    for sample, norm in zip(tokens, found, strict=True):
        truth = alone(tiny(kind, tied=tied).eval(), state, sample)
        dense = truth.gradients["embedding"] / truth.counted
        assert norm == pytest.approx(float(dense.norm()), rel=1e-4)


def test_dropout_does_not_make_it_random() -> None:
    model, tokens = tiny(resid_pdrop=0.5, embd_pdrop=0.5).train(), list(samples(2).values())
    assert (gradnorms(model, tokens) == gradnorms(model, tokens)).all()


def test_what_was_learned_has_a_small_gradient_and_a_loss_below_the_reference_s() -> None:
    reference, tokens = tiny(seed=3), list(samples(24, seed=1, longest=12).values())
    model = deepcopy(reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    inside, outside = tokens[:12], tokens[12:]
    for _ in range(40):
        (-log_likelihoods(model, inside).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    norms = [-gradnorms(model, some) for some in (inside, outside)]
    assert auc(*norms) > 0.95

    def above(some: list[Tensor]) -> NDArray[np.float64]:
        of = [sample_losses(each, some).double().numpy() for each in (model, reference)]
        return above_reference(*of)

    assert auc(-above(inside), -above(outside)) == 1
    assert above_reference(np.array([1.0, 4.0]), np.array([3.0, 3.0])).tolist() == [-2, 1]


def test_the_command_s_figures_are_those_of_its_samples(copied: Tiny) -> None:
    reference = copied.store.parent / "reference"
    model = load_model(copied.model)
    with torch.no_grad():
        for weight in model.parameters():  # so far that it knows nothing of what it was taught
            weight.add_(torch.randn_like(weight), alpha=0.2)
    model.save_pretrained(reference)
    load_tokenizer(copied.model).save_pretrained(reference)
    given = [f"p-{number:02d}" for number in range(1, 10)]
    shown = run_json(
        "eval", *given, "-s", copied.store, "--model", copied.model, "--original", reference,
        "--reference", reference, code=3,
    )  # fmt: skip
    rows = {(row["metric"], row["role"]): row for row in shown["metrics"]}
    with Store.open(copied.store) as store:
        kept = store.table("FROM evidence WHERE id IS NOT NULL")

    def of(metric: str, role: str, name: str = "model") -> list[float]:
        return [r[name] for r in kept if (r["metric"], r["role"]) == (metric, role)]

    for metric in ("gradnorm", "loss_above_reference"):
        members, strangers = of(metric, "forget"), of(metric, "holdout")
        truth = [1] * len(members) + [0] * len(strangers)
        expected = roc_auc_score(truth, [-value for value in members + strangers])
        row = rows[f"auc_{metric}", "forget"]
        assert row["model"] == pytest.approx(expected)
        assert row["model_low"] <= row["model"] <= row["model_high"]
    assert of("gradnorm", "retained") == []  # a backward pass each is only for membership
    losses = [np.array(of("loss", "forget", name)) for name in ("model", "reference")]
    assert of("loss_above_reference", "forget") == pytest.approx(losses[0] - losses[1])
    assert (
        rows["auc_loss_above_reference", "forget"]["original"] == 0.5
    )  # of the reference against itself
    assert rows["auc_loss_above_reference", "forget"]["reference"] is None
    for figure, metric in (("ks_loss", "loss"), ("ks_probability", "mean_probability")):
        expected = stats.ks_2samp(of(metric, "forget"), of(metric, "forget", "reference"))
        row = rows[figure, "forget"]
        assert row["model"] == pytest.approx(expected.statistic)
        assert row["model_low"] <= row["model_high"]
        assert rows[f"{figure}_p", "forget"]["model"] == pytest.approx(expected.pvalue)
        assert row["original"] == 0
    inside, outside = (
        np.array([of("min_k", role, name) for name in ("model", "reference")])
        for role in ("forget", "holdout")
    )
    ours, theirs = (auc(a, b) for a, b in zip(inside, outside, strict=True))
    leak = rows["privleak_min_k", "forget"]
    assert leak["model"] == pytest.approx(privleak(ours, theirs))
    assert leak["model_low"] <= leak["model"] <= leak["model_high"]
    assert (leak["original_low"], leak["original"], leak["original_high"]) == (0, 0, 0)
