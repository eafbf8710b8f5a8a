"""Baselines: what they descend is what the papers say, and they stop where they are told to."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import Tiny
from torch import Tensor

from gradstore import Store
from gradstore.errors import ForgetError
from gradstore.evaluate.loss import sample_losses
from gradstore.unlearn import controls
from gradstore.unlearn.baselines import (
    METHODS,
    BaselineSettings,
    objective,
    retained_from,
    unlearn_by_steps,
)

pytest_plugins = ["tiny"]
LOG_P = st.floats(-30, 0)
FORGET, RETAINED = (list(models.samples(count, seed).values()) for count, seed in ((3, 1), (6, 2)))
QUICK = BaselineSettings(steps=4, learning_rate=3e-3, batch_size=2)


def descended(
    log_p: list[float], reference: list[float], retained: list[float] | None, **settings: Any
) -> tuple[float, list[float]]:
    """The objective, and its gradient with respect to the forgotten's log-likelihoods."""
    given_log_p = torch.tensor(log_p, dtype=torch.float64, requires_grad=True)
    stay = None if retained is None else torch.tensor(retained, dtype=torch.float64)
    before = torch.tensor(reference, dtype=torch.float64)
    loss = objective(given_log_p, before, stay, BaselineSettings(**settings))
    [gradient] = torch.autograd.grad(loss, given_log_p)
    return loss.item(), gradient.tolist()


# -- objectives --------------------------------------------------------------------------------


@given(st.lists(st.tuples(LOG_P, LOG_P), min_size=1, max_size=4), st.floats(0.01, 2), LOG_P)
def test_npo_is_its_closed_form(pairs: list[tuple[float, float]], beta: float, stay: float) -> None:
    log_p, reference = map(list, zip(*pairs, strict=True))
    powers = [math.exp(beta * (one - before)) for one, before in pairs]  # (π_θ/π_ref)^β
    loss, gradient = descended(
        log_p, reference, [stay], method="npo", beta=beta, retained_weight=0.5
    )
    expected = sum(2 / beta * math.log1p(power) for power in powers) / len(pairs) - 0.5 * stay
    assert loss == pytest.approx(expected, rel=1e-9)
    weights = [2 * power / (1 + power) / len(pairs) for power in powers]  # the paper's W_θ
    assert gradient == pytest.approx(weights, rel=1e-9)


@given(st.lists(st.tuples(LOG_P, LOG_P), min_size=1, max_size=4))
def test_npo_becomes_ga_as_beta_vanishes(pairs: list[tuple[float, float]]) -> None:
    log_p, reference = map(list, zip(*pairs, strict=True))
    loss, ascent = descended(log_p, reference, None, method="ga")
    assert loss == pytest.approx(sum(log_p) / len(log_p))
    for beta in (1e-2, 1e-4):
        _, gradient = descended(log_p, reference, None, method="npo", beta=beta)
        assert gradient == pytest.approx(ascent, rel=30 * beta)  # |log ratio| is at most 30
        _, at_the_start = descended(reference, reference, None, method="npo", beta=beta)
        assert at_the_start == pytest.approx(ascent)


def test_graddiff_is_ascent_and_descent() -> None:
    loss, gradient = descended([-4.0, -2.0], [0.0, 0.0], [-1.0, -3.0], method="graddiff")
    assert (loss, gradient) == (-3 + 2, [0.5, 0.5])
    loss, _ = descended([-4.0], [0.0], [-1.0], method="graddiff", retained_weight=3.0)
    assert loss == -4 + 3
    assert descended([-4.0], [0.0], [-1.0], method="ga") == (-4, [1])


# -- steps -------------------------------------------------------------------------------------


def unlearned(settings: BaselineSettings, **more: Any) -> tuple[Any, Any]:
    model = models.tiny()
    return model, unlearn_by_steps(model, FORGET, RETAINED, settings, **more)


def mean_loss(model: Any, samples: list[Tensor]) -> float:
    return float(sample_losses(model, samples).mean())


@pytest.mark.parametrize("method", METHODS)
def test_a_first_step_of_any_method_without_retained_adds_the_fresh_gradient(method: Any) -> None:
    settings = BaselineSettings(
        method, 1, len(FORGET), "sgd", 0.01, 0.0, retained_weight=0, embedding_only=True
    )
    before = models.snapshot(models.tiny())
    fresh = controls.fresh(models.tiny(), FORGET)
    model, _ = unlearned(settings)
    for name, weight in model.state_dict().items():
        if weight.shape == fresh.shape:  # the embedding, and the head tied to it
            moved = weight - before[name]
            assert models.relative(moved, 0.01 / len(FORGET) * fresh) < 1e-4
        else:
            assert torch.equal(weight, before[name]), name


def test_the_retained_term_pulls_back_what_stays() -> None:
    alone, together = (
        unlearned(replace(QUICK, method="graddiff", retained_weight=weight))[1]
        for weight in (0.0, 5.0)
    )
    assert together.chosen.retained < min(together.points[0].retained, alone.chosen.retained)


def test_graddiff_without_retained_weight_is_ga() -> None:
    ga, path = unlearned(replace(QUICK, method="ga"))
    same, path_of_same = unlearned(replace(QUICK, method="graddiff", retained_weight=0.0))
    assert path == path_of_same
    assert all(torch.equal(a, b) for a, b in zip(ga.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_the_path_is_what_the_model_went(method: Any) -> None:
    model, path = unlearned(replace(QUICK, method=method))
    assert [point.step for point in path.points] == [0, 1, 2, 3, 4]
    assert path.chosen == path.points[-1]
    assert path.reached
    start = models.tiny()
    for network, point in ((start, path.points[0]), (model, path.chosen)):
        assert point.forget == pytest.approx(mean_loss(network, FORGET), rel=1e-6)
        assert point.retained == pytest.approx(mean_loss(network, RETAINED), rel=1e-6)
    assert path.chosen.forget > path.points[0].forget + 0.1
    untouched = [a for a, b in zip(model.parameters(), start.parameters(), strict=True)
                 if torch.equal(a, b)]  # fmt: skip
    assert untouched == []
    assert all(weight.grad is None for weight in model.parameters())


def test_the_same_seed_does_the_same_and_dropout_does_not_matter() -> None:
    settings = replace(QUICK, seed=7)
    path = unlearned(settings)[1]
    model = models.tiny(resid_pdrop=0.5).train()
    assert unlearn_by_steps(model, FORGET, RETAINED, settings) == path
    assert model.training
    assert unlearned(replace(QUICK, seed=8))[1] != path


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_the_state_nearest_to_the_target_is_kept(share: float) -> None:
    settings = replace(QUICK, steps=9)
    points = unlearned(settings)[1].points
    low, high = points[3].forget, points[4].forget
    assert all(point.forget < low < high for point in points[:3])
    model, path = unlearned(settings, target=low + share * (high - low))
    assert (path.points, path.reached) == (points[:5], True)  # it goes no further
    assert path.chosen == points[3 if share < 0.5 else 4]
    assert mean_loss(model, FORGET) == pytest.approx(path.chosen.forget, rel=1e-6)


def test_a_target_that_is_met_already_or_cannot_be() -> None:
    before = models.snapshot(models.tiny())
    model, path = unlearned(QUICK, target=0.01)
    assert (len(path.points), path.chosen.step, path.reached) == (1, 0, True)
    assert all(torch.equal(weight, before[n]) for n, weight in model.state_dict().items())
    path = unlearned(QUICK, target=99.0)[1]
    assert (path.chosen, path.reached) == (path.points[-1], False)


def test_a_model_that_breaks_is_not_kept() -> None:
    settings = replace(QUICK, method="ga", optimizer="sgd", learning_rate=1e38)
    model, path = unlearned(settings)
    assert ([point.step for point in path.points], path.reached) == ([0], False)
    assert mean_loss(model, FORGET) == pytest.approx(path.chosen.forget)


def test_what_cannot_be_carried_out_is_refused() -> None:
    for wrong, said in (
        ({"method": "kto"}, "'kto' is no method; give one of ga, graddiff, npo"),
        ({"optimizer": "lion"}, "'lion' is no optimizer; give one of adamw, sgd"),
        ({"beta": 0.0}, "beta=0.0 means nothing; give a positive number"),
        ({"retained_weight": -1.0}, "retained_weight=-1.0 means nothing; give 0 or"),
        ({"steps": 0}, "steps=0 means nothing"),
        ({"learning_rate": math.nan}, "learning_rate=nan means nothing"),
    ):
        with pytest.raises(ForgetError, match=said):
            BaselineSettings(**wrong)
    model = models.tiny()
    with pytest.raises(ForgetError, match="nothing to forget"):
        unlearn_by_steps(model, [], RETAINED)
    with pytest.raises(ForgetError, match="npo descends on retained .* retained_weight=0"):
        unlearn_by_steps(model, FORGET, [])
    with pytest.raises(ForgetError, match="at least two tokens"):
        unlearn_by_steps(model, [torch.tensor([3])], RETAINED)
    model.requires_grad_(False)
    with pytest.raises(ForgetError, match="frozen"):
        unlearn_by_steps(model, FORGET, RETAINED)
    path = unlearn_by_steps(models.tiny(), FORGET, [], replace(QUICK, retained_weight=0))
    assert path.chosen.retained is None


# -- retained samples of a store ---------------------------------------------------------------


def test_retained_samples_come_from_the_store(trained: Tiny) -> None:
    store = Store.open(trained.store)
    run, gone = store.run(), ["p-07", "p-11"]
    names = [f"p-{n:02d}" for n in range(1, 25) if f"p-{n:02d}" not in gone]
    numbers = sorted(store.resolve(names).values())
    expected = [store.tokens([number], run["run_id"])[number].tolist() for number in numbers]
    assert [tokens.tolist() for tokens in retained_from(store, run, gone)] == expected
    some = [tokens.tolist() for tokens in retained_from(store, run, gone, at_most=5, seed=1)]
    assert len(some) == 5
    assert [tokens for tokens in expected if tokens in some] == some
    assert some != [t.tolist() for t in retained_from(store, run, gone, at_most=5, seed=2)]
