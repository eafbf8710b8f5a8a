"""The n×n solve gives what the dense system of all parameters gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradstore.factored import FactoredGradient, Term
from gradstore.influence.woodbury import woodbury

ROWS, WIDTH = 270, 2  # more rows than are worked on together
SHAPE = (ROWS, WIDTH)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[FactoredGradient], Tensor, Tensor]:
    """Gradients with both kinds of terms, some of them doubled or sums of others; g and M."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    rand: Any = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    gradients = []
    for _ in range(draw(st.integers(1, 5))):
        t = draw(st.integers(1, 6))
        index = torch.randint(0, ROWS, (t, 4), generator=generator)
        terms = [Term(index, rand(t, 4), rand(t, WIDTH)), Term(None, rand(1, ROWS), rand(1, WIDTH))]
        gradients.append(FactoredGradient(terms, SHAPE) * 10 ** draw(st.floats(-1, 1)))
    for _ in range(draw(st.integers(0, 2))):
        gradients.append(draw(st.sampled_from(gradients)) + draw(st.sampled_from(gradients)))
    for _ in range(draw(st.integers(0, 2))):
        gradients.append(draw(st.sampled_from(gradients)))
    diagonal = rand(*SHAPE).exp()
    return gradients, rand(*SHAPE), diagonal


def stacked(gradients: list[FactoredGradient]) -> Tensor:
    """The gradients as rows, in double precision, from their dense products."""
    rows = []
    for gradient in gradients:
        dense = torch.zeros(SHAPE, dtype=torch.float64)
        for term in gradient.terms:
            left = term.value.double()
            if term.index is not None:
                zeros = torch.zeros(len(left), ROWS, dtype=torch.float64)
                left = zeros.scatter_add_(1, term.index, left)
            dense += left.T @ term.B.double()
        rows.append(dense.flatten())
    return torch.stack(rows)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@given(problems(), st.floats(-3, 4))
def test_it_solves_the_dense_system(
    problem: tuple[list[FactoredGradient], Tensor, Tensor], exponent: float
) -> None:
    gradients, g, diagonal = problem
    strength = 10**exponent
    rows = stacked(gradients)
    dense = torch.diag(diagonal.double().flatten()) + strength * rows.T @ rows / len(rows)
    expected = torch.linalg.solve(dense, g.double().flatten())
    found = woodbury(gradients, g, diagonal, strength)
    assert found.dtype is torch.float32
    assert relative(found.double().flatten(), expected) < 1e-4


@given(problems())
def test_its_limit_is_the_step_less_what_the_gradients_span(
    problem: tuple[list[FactoredGradient], Tensor, Tensor],
) -> None:
    gradients, g, diagonal = problem
    root = diagonal.double().flatten().sqrt()
    scaled = (stacked(gradients) / root).T  # in the metric of M, orthogonal means orthogonal
    step = g.double().flatten() / root
    left, values, _ = torch.linalg.svd(scaled, full_matrices=False)
    span = left[:, values / values[0] > 1e-6]
    expected = (step - span @ (span.T @ step)) / root
    found = woodbury(gradients, g, diagonal, math.inf)
    assert relative(found.double().flatten(), expected) < 1e-4
    assert relative(woodbury(gradients, g, diagonal, 1e12), found) < 1e-4
    for gradient in gradients:
        assert abs(gradient.dot(_all_rows(found))) < 1e-4 * gradient.norm() * float(found.norm())


@given(problems())
def test_what_the_gradients_span_has_no_step_in_the_limit(
    problem: tuple[list[FactoredGradient], Tensor, Tensor],
) -> None:
    gradients, _, diagonal = problem
    g = FactoredGradient.sum(gradients).dense()
    found = woodbury(gradients, g, diagonal, math.inf)
    assert float(found.norm()) < 1e-4 * float((g / diagonal).norm())


def test_without_strength_or_gradients_only_the_diagonal_acts() -> None:
    g, diagonal = torch.randn(SHAPE), torch.rand(SHAPE) + 0.5
    assert torch.equal(woodbury([], g, diagonal, 1.0), g / diagonal)
    assert torch.equal(woodbury([_all_rows(g)], g, diagonal, 0.0), g / diagonal)
    assert torch.equal(woodbury([], g, 2.0, 1.0), g / 2)


def test_a_gradient_of_zero_changes_nothing() -> None:
    g, nothing = torch.randn(SHAPE), FactoredGradient([], SHAPE)
    assert relative(woodbury([nothing], g, 2.0, math.inf), g / 2) < 1e-6


@pytest.mark.parametrize(("diagonal", "strength"), [(0.0, 1.0), (-1.0, 1.0), (1.0, -1.0)])
def test_what_is_not_positive_is_refused(diagonal: float, strength: float) -> None:
    with pytest.raises(ValueError, match="must"):
        woodbury([], torch.zeros(SHAPE), diagonal, strength)


def test_a_gradient_of_another_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="different weights"):
        woodbury([FactoredGradient([], (1, 2))], torch.zeros(SHAPE), 1.0, 1.0)


def _all_rows(dense: Tensor) -> FactoredGradient:
    return FactoredGradient([Term.one_hot(torch.arange(ROWS), dense)], SHAPE)
