"""Statistics of membership against scikit-learn and SciPy; divergences against the dense sum."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import samples, tiny
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from gradstore.evaluate.divergence import divergences, excess, nearer, per_token
from gradstore.evaluate.statistics import (
    auc,
    distance,
    estimate,
    kolmogorov_smirnov,
    mean,
    privleak,
    ratio,
    true_positive_rate,
)

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30)
DISTINCT = st.lists(st.integers(0, 10_000), min_size=2, max_size=60, unique=True)


@settings(max_examples=40)
@given(SCORES, SCORES)
def test_auc_and_true_positive_rate_are_scikit_learns(a: list[float], b: list[float]) -> None:
    truth, scores = [1] * len(a) + [0] * len(b), a + b
    assert auc(a, b) == pytest.approx(roc_auc_score(truth, scores))
    assert auc(a, b) + auc(b, a) == pytest.approx(1)
    for false in (0.01, 0.2):
        rates, true, _ = roc_curve(truth, scores, drop_intermediate=False)
        expected = true[rates <= false].max()
        assert true_positive_rate(a, b, false) == pytest.approx(expected)


@given(DISTINCT, st.data())
def test_kolmogorov_smirnov_is_scipys_exact_test(every: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(every) - 1))
    a, b = [float(x) for x in every[:cut]], [float(x) for x in every[cut:]]
    expected = stats.ks_2samp(a, b, method="exact")
    assert kolmogorov_smirnov(a, b) == pytest.approx(
        (expected.statistic, expected.pvalue), abs=1e-9
    )


def test_kolmogorov_smirnov_of_the_same_and_of_the_farthest() -> None:
    assert kolmogorov_smirnov([1, 2, 3], [1, 2, 3]) == (0, 1)
    distance, p = kolmogorov_smirnov([1, 2, 3], [4, 5, 6])
    assert distance == 1
    assert p == pytest.approx(2 / math.comb(6, 3))


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30))
def test_the_distance_of_pairs_is_scipys(pairs: list[tuple[int, int]]) -> None:
    one, other = zip(*pairs, strict=True)
    expected = stats.ks_2samp(one, other).statistic
    assert distance(np.array(pairs, dtype=float)) == pytest.approx(expected)
    assert kolmogorov_smirnov(one, other)[0] == pytest.approx(expected)


def test_the_interval_of_a_distance_draws_records_with_both_their_figures() -> None:
    values = np.random.default_rng(0).normal(size=(40, 1))
    same, apart = np.hstack([values, values]), np.hstack([values, values + 9])
    assert estimate(distance, same).as_tuple() == (0, 0, 0)  # drawn apart it would never be 0
    assert estimate(distance, apart).as_tuple() == (1, 1, 1)
    found = estimate(distance, np.hstack([values, values + 0.5]))
    assert found.low < found.value < found.high


def test_privleak_in_closed_form() -> None:
    assert privleak(0.5, 0.5) == 0
    assert privleak(1.0, 0.5) == -100  # still members
    assert privleak(0.0, 0.5) == 100  # they stand out
    assert math.isnan(privleak(0.5, 1.0))


def test_the_interval_of_a_mean_is_students() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = estimate(mean, values)
    error = stats.sem(values)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    assert values.mean() in found
    assert 9 not in found


def test_an_interval_is_as_wide_as_what_can_vary() -> None:
    assert estimate(mean, [2.0]).as_tuple() == (2, None, None)
    assert estimate(auc, [0.5], [0.0, 1.0]).low < 0.5
    assert estimate(mean, []).as_tuple() == (None, None, None)
    assert estimate(ratio, [[1.0, 2.0], [3.0, 2.0]]).value == 1


# -- divergences -------------------------------------------------------------------------------


def test_divergences_are_the_sums_over_the_vocabulary() -> None:
    one, other, tokens = tiny(seed=1), tiny(seed=2), list(samples(3).values())
    for sample, found in zip(tokens, divergences(one, other, tokens), strict=True):
        p, q = (m(input_ids=sample[None]).logits[0, :-1].softmax(-1) for m in (one, other))
        expected = (p * (p / q).log()).sum(-1).tolist()
        assert found.tolist() == pytest.approx(expected, rel=1e-3)
    assert max(float(each.abs().max()) for each in divergences(one, one, tokens)) == 0
    assert one.training


@pytest.mark.parametrize("count", [1, 3, 12])
def test_nearer_tells_on_which_side_a_model_is(count: int) -> None:
    original, reference = tiny(seed=1), tiny(seed=2)
    tokens = list(samples(count, seed=4, longest=20).values())
    between = tiny(seed=1)
    for share, sign in ((0.9, -1), (0.1, 1)):
        with torch.no_grad():
            for weights in zip(
                *(m.parameters() for m in (between, original, reference)), strict=True
            ):
                weights[0].copy_(torch.lerp(weights[1], weights[2], share))
        gap = nearer(
            divergences(reference, between, tokens), divergences(original, between, tokens)
        )
        assert gap.low <= gap.value <= gap.high
        assert sign * gap.low > 0
        assert sign * gap.high > 0
    everything = torch.cat(divergences(reference, original, tokens))
    assert per_token([everything]).value == pytest.approx(float(everything.mean()))


def test_excess_is_of_what_differs_more() -> None:
    here, there = [torch.full((5,), 0.7)] * 10, [torch.full((3,), 0.2)] * 10
    assert excess(here, there).value == pytest.approx(0.5)
    assert excess(here, there).low > 0
    assert excess(here, here).low <= 0
