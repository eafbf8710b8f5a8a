"""The algebra of factored gradients is that of the dense matrices they stand for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradstore.factored import FactoredGradient, Term

ROWS, WIDTH = 7, 3
SHAPE = (ROWS, WIDTH)
FACTORS = st.floats(-4, 4, width=32)


@st.composite
def terms(draw: st.DrawFn) -> tuple[Term, Tensor]:
    """A sparse or dense term, and its AᵀB built entry by entry."""
    t, k = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    right = torch.randn(t, WIDTH, generator=generator)
    if draw(st.booleans()):
        left = torch.randn(t, ROWS, generator=generator)
        return Term(None, left, right), left.T @ right
    # few columns to choose from: they repeat within a row and across rows
    index = torch.randint(0, draw(st.integers(1, ROWS)), (t, k), generator=generator)
    value = torch.randn(t, k, generator=generator)
    product = torch.zeros(SHAPE)
    for i in range(t):
        for j in range(k):
            product[index[i, j]] += value[i, j] * right[i]
    return Term(index, value, right), product


@st.composite
def gradients(draw: st.DrawFn) -> tuple[FactoredGradient, Tensor]:
    """A gradient of zero to four terms, and the dense matrix that it must equal."""
    drawn = draw(st.lists(terms(), max_size=4))
    products = torch.stack([torch.zeros(SHAPE), *(product for _, product in drawn)])
    return FactoredGradient((term for term, _ in drawn), SHAPE), products.sum(0)


def same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=2e-5)


@given(gradients())
def test_dense_multiplies_every_term_out(pair: tuple[FactoredGradient, Tensor]) -> None:
    gradient, expected = pair
    assert same(gradient.dense(), expected)


@given(gradients(), gradients())
def test_dot_and_norm(
    a: tuple[FactoredGradient, Tensor], b: tuple[FactoredGradient, Tensor]
) -> None:
    product = float((a[1] * b[1]).sum())
    tolerance = 1e-5 * (1 + float(a[1].norm() * b[1].norm()))
    assert a[0].dot(b[0]) == pytest.approx(product, rel=1e-4, abs=tolerance)
    assert b[0].dot(a[0]) == pytest.approx(a[0].dot(b[0]), rel=1e-4, abs=tolerance)
    assert a[0].norm() == pytest.approx(float(a[1].norm()), rel=1e-4, abs=5e-3)


@given(gradients(), st.integers(0, 1 << 16))
def test_along_a_dense_direction(pair: tuple[FactoredGradient, Tensor], seed: int) -> None:
    direction = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    expected = float((pair[1] * direction).sum())
    tolerance = 1e-5 * (1 + float(pair[1].norm() * direction.norm()))
    assert pair[0].along(direction) == pytest.approx(expected, rel=1e-4, abs=tolerance)


@given(gradients(), gradients(), FACTORS)
def test_sums_differences_and_multiples(
    a: tuple[FactoredGradient, Tensor], b: tuple[FactoredGradient, Tensor], factor: float
) -> None:
    assert same((a[0] + b[0]).dense(), a[1] + b[1])
    assert same((a[0] - b[0]).dense(), a[1] - b[1])
    assert same((a[0] * factor).dense(), a[1] * factor)
    assert same((factor * a[0]).dense(), a[1] * factor)
    assert same(FactoredGradient.sum([a[0], b[0], a[0]]).dense(), a[1] + b[1] + a[1])


@given(gradients(), st.lists(st.integers(0, ROWS - 1), max_size=5))
def test_rows(pair: tuple[FactoredGradient, Tensor], wanted: list[int]) -> None:
    gradient, expected = pair
    tokens, values = gradient.rows()
    touched = {int(i) for t in gradient.terms if t.index is not None for i in t.index.flatten()}
    assert tokens.tolist() == sorted(touched)
    assert same(values, expected[tokens])
    asked, values = gradient.rows(torch.tensor(wanted, dtype=torch.long))
    assert asked.tolist() == wanted
    assert same(values, expected[wanted])


@given(gradients())
def test_rows_hands_out_a_copy(pair: tuple[FactoredGradient, Tensor]) -> None:
    gradient, expected = pair
    gradient.rows()[1].fill_(9.0)
    assert same(gradient.dense(), expected)


@given(gradients(), FACTORS)
def test_add_to_changes_the_weight_in_place(
    pair: tuple[FactoredGradient, Tensor], alpha: float
) -> None:
    gradient, expected = pair
    weight = torch.ones(SHAPE, requires_grad=True)
    assert gradient.add_to(weight, alpha) is weight
    assert same(weight.detach(), 1 + alpha * expected)
    assert weight.grad_fn is None


def test_add_to_leaves_untouched_rows_alone_and_keeps_the_weights_type() -> None:
    gradient = FactoredGradient([Term.one_hot(torch.tensor([1, 1]), torch.ones(2, WIDTH))], SHAPE)
    weight = torch.full(SHAPE, 1 / 3, dtype=torch.bfloat16)
    before = weight.clone()
    gradient.add_to(weight)
    others = [i for i in range(ROWS) if i != 1]
    assert weight.dtype is torch.bfloat16
    assert torch.equal(weight[others], before[others])
    assert torch.equal(weight[1], before[1] + 2)


def test_long_terms_are_multiplied_out_in_blocks() -> None:
    count = 5000  # more rows than are held at once
    index = torch.randint(0, ROWS, (count, 2))
    value, right = torch.randn(count, 2), torch.randn(count, WIDTH)
    left = torch.zeros(count, ROWS).scatter_add_(1, index, value)
    dense = FactoredGradient([Term(index, value, right)], SHAPE).dense()
    assert torch.allclose(dense, left.T @ right, rtol=1e-4, atol=1e-2)


def test_half_precision_factors_are_computed_with_in_float32() -> None:
    ids, right = torch.tensor([2, 2], dtype=torch.int32), torch.full((2, WIDTH), 1 / 3)
    term = Term.one_hot(ids, right.bfloat16())
    gradient = FactoredGradient([term], SHAPE)
    assert gradient.dense().dtype is torch.float32
    assert torch.equal(gradient.dense()[2], 2 * right[0].bfloat16().float())


def test_the_gradient_of_nothing_is_zero() -> None:
    empty = FactoredGradient([], SHAPE)
    assert torch.equal(empty.dense(), torch.zeros(SHAPE))
    assert empty.norm() == 0.0
    assert empty.rows()[0].tolist() == []


def test_factors_that_do_not_fit_together_are_refused() -> None:
    two, three = torch.zeros(2, 1), torch.zeros(3, WIDTH)
    with pytest.raises(ValueError, match="do not fit together"):
        Term(None, two, three)
    with pytest.raises(ValueError, match="do not fit together"):
        Term(torch.zeros(2, 2, dtype=torch.long), two, torch.zeros(2, WIDTH))
    with pytest.raises(ValueError, match="do not fit together"):
        Term.one_hot(torch.tensor([1, 2, 3]), torch.zeros(2, WIDTH))


def test_terms_that_do_not_fit_the_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit a weight"):
        FactoredGradient([Term.one_hot(torch.tensor([0]), torch.zeros(1, WIDTH + 1))], SHAPE)
    with pytest.raises(ValueError, match="does not fit a weight"):
        FactoredGradient([Term(None, torch.zeros(1, ROWS + 1), torch.zeros(1, WIDTH))], SHAPE)


def test_gradients_of_different_weights_do_not_mix() -> None:
    one, other = FactoredGradient([], SHAPE), FactoredGradient([], (ROWS + 1, WIDTH))
    for mix in (one.dot, one.__add__, one.__sub__, lambda g: FactoredGradient.sum([one, g])):
        with pytest.raises(ValueError, match="different weights"):
            mix(other)
    with pytest.raises(ValueError, match="the gradient"):
        one.along(torch.zeros(ROWS + 1, WIDTH))
    with pytest.raises(ValueError, match="the gradient"):
        one.add_to(torch.zeros(ROWS + 1, WIDTH))
