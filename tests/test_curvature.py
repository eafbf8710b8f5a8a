"""A Gauss-Newton product is the second derivative of a divergence; the solver solves."""

from __future__ import annotations

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from gradstore.errors import ForgetError
from gradstore.influence import predictions
from gradstore.influence.curvature import GaussNewton, conjugate_gradients


def divergence(network: nn.Module, weight: Tensor, v: Tensor, samples: list[Tensor]) -> Tensor:
    """KL(model ‖ model with v added to its embedding), the mean over predictions, one by one."""
    start, kept = [], weight.detach().clone()
    with torch.no_grad():
        for tokens in samples:
            start.append(log_softmax(network(input_ids=tokens[None]).logits[0, :-1], -1))
        weight.add_(v)
        total = torch.zeros((), dtype=weight.dtype)
        for p, tokens in zip(start, samples, strict=True):
            q = log_softmax(network(input_ids=tokens[None]).logits[0, :-1], -1)
            total += kl_div(q, p, log_target=True, reduction="sum")
        weight.copy_(kept)
    return total / sum(len(tokens) - 1 for tokens in samples)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("entries", [1, 2**25])
def test_it_is_the_curvature_of_the_divergence(
    tied: bool, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "ENTRIES", entries)  # a sample at a time, or all at once
    torch.manual_seed(0)
    network = models.tiny(tied=tied).double().eval()
    weight = network.get_input_embeddings().weight
    samples = list(models.samples(5).values())
    G = GaussNewton(network, samples)
    before = weight.detach().clone()
    v, w = torch.randn_like(before), torch.randn_like(before)
    size = 1e-4
    expected = 2 * divergence(network, weight, size * v, samples) / size**2
    assert float((v * G(v)).sum()) == pytest.approx(float(expected), rel=1e-2)
    assert float((v * G(w)).sum()) == pytest.approx(float((w * G(v)).sum()), rel=1e-8)
    assert torch.allclose(G(2 * v - w), 2 * G(v) - G(w), atol=1e-12)
    assert torch.equal(weight, before)
    assert weight.grad is None


def test_the_padding_row_does_not_move() -> None:
    torch.manual_seed(0)
    network = models.tiny("llama", pad_token_id=3).double()
    network.train()
    samples = [torch.tensor([5, 3, 7, 3, 9]), torch.tensor([3, 8, 6])]
    G = GaussNewton(network, samples)
    v, w = (torch.randn_like(network.get_input_embeddings().weight) for _ in range(2))
    assert float((v * G(w)).sum()) == pytest.approx(float((w * G(v)).sum()), rel=1e-5)
    assert not G(v)[3].any()
    assert network.training


def test_a_model_without_forward_derivatives_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise NotImplementedError("Trying to use forward AD with _grouped_mm")

    monkeypatch.setattr(predictions, "jvp", none)
    network = models.tiny()
    with pytest.raises(ForgetError, match=r"GPT2LMHeadModel has no .* give --direction applied"):
        GaussNewton(network, [torch.tensor([1, 2, 3])])(network.get_input_embeddings().weight)


@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 4))
def test_conjugate_gradients_solve_and_never_get_further_away(
    seed: int, rows: int, columns: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    size = rows * columns
    root = torch.randn(size, size, generator=draw, dtype=torch.float64)
    diagonal = torch.rand(rows, columns, generator=draw, dtype=torch.float64) + 0.1
    A = root @ root.T + torch.diag(diagonal.flatten())
    b = torch.randn(rows, columns, generator=draw, dtype=torch.float64)
    exact = torch.linalg.solve(A, b.flatten())

    def operator(x: Tensor) -> Tensor:
        return (A @ x.flatten()).view_as(x)

    distances = []
    for iterations in range(4):
        solved = conjugate_gradients(operator, b, diagonal, iterations=iterations, tolerance=0.0)
        missing = solved.x.flatten() - exact
        distances.append(float(missing @ A @ missing))
    assert distances == sorted(distances, reverse=True) or distances[-1] < 1e-12
    solved = conjugate_gradients(operator, b, diagonal, iterations=10 * size, tolerance=1e-9)
    assert torch.allclose(solved.x.flatten(), exact, atol=1e-5)
    assert solved.residual <= 1e-9
    nothing = conjugate_gradients(operator, 0 * b, diagonal, iterations=5, tolerance=0.1)
    assert (nothing.iterations, float(nothing.x.abs().max())) == (0, 0.0)
