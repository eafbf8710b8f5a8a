"""What is read off the gradient at the logits is what autograd and a plain top-k say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from gradstore.capture.compact import CompactOutput, compact, largest, next_tokens, position_facts

SEEDS = st.integers(0, 1 << 16)


def drawn(seed: int, n: int, vocabulary: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(n, vocabulary, generator=generator)
    return logits, torch.randint(0, vocabulary, (n,), generator=generator)


def residual(logits: Tensor, labels: Tensor) -> Tensor:
    """R = softmax − one-hot, in double precision."""
    return torch.softmax(logits.double(), -1) - one_hot(labels, logits.shape[1])


def rebuilt(output: CompactOutput, labels: Tensor) -> Tensor:
    """The R that a compact output stands for."""
    R = output.tail_mass[:, None] * output.tail
    R = R.scatter_add(1, output.index, output.value)
    return R.scatter_add(1, labels[:, None], output.label[:, None])


@given(SEEDS, st.integers(1, 4), st.integers(1, 6000), st.data())
def test_largest_is_an_exact_top_k(seed: int, n: int, width: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, width) | st.integers(1, min(width, 64)))
    matrix = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    if data.draw(st.booleans()):
        matrix = (matrix * 3).round()  # ties
    value, index = largest(matrix, k)
    assert torch.equal(matrix.gather(1, index), value)
    assert all(len(set(row)) == k for row in index.tolist())
    assert torch.equal(value.sort(-1).values, matrix.topk(k).values.sort(-1).values)


@pytest.mark.parametrize(("width", "k"), [(1025, 128), (8191, 1023), (8192, 64), (50_257, 64)])
def test_largest_finds_winners_that_crowd_together(width: int, k: int) -> None:
    ahead = torch.zeros(3, width)
    ahead[0, :k] = ahead[1, -k:] = ahead[2, :: width // k][:k] = torch.arange(1.0, k + 1)
    for row, (value, _) in ((row, largest(row[None], k)) for row in ahead):
        assert torch.equal(value[0].sort().values, row[row > 0].sort().values)


@given(SEEDS, st.integers(2, 700), st.floats(-8, 8), st.floats(0.1, 8))
def test_facts_recover_share_and_loss(
    seed: int, vocabulary: int, exponent: float, spread: float
) -> None:
    logits, labels = drawn(seed, 6, vocabulary, spread)
    scale = 10.0**exponent
    logits.requires_grad_()
    losses = cross_entropy(logits, labels, reduction="none")
    (losses * scale).sum().backward()
    assert logits.grad is not None
    facts = position_facts(logits.detach(), logits.grad, labels)
    assert torch.allclose(facts.share, torch.full((6,), scale), rtol=2e-4)
    assert torch.allclose(facts.loss, losses.detach(), rtol=1e-4, atol=2e-4)
    unsure = 1 - torch.exp(-losses.detach().double()).float()
    assert torch.allclose(facts.weight / scale, unsure, rtol=1e-3, atol=2e-6)
    assert facts.pulled.all()


def test_facts_notice_that_something_besides_the_label_is_pulled_up() -> None:
    logits, labels = drawn(0, 4, 50)
    logits.requires_grad_()
    cross_entropy(logits, labels, label_smoothing=0.3).backward()
    assert logits.grad is not None
    assert not position_facts(logits.detach(), logits.grad, labels).pulled.all()


@given(SEEDS, st.integers(2, 1500), st.floats(1e-3, 1e3))
def test_compact_is_exact_when_it_keeps_everything(
    seed: int, vocabulary: int, scale: float
) -> None:
    logits, labels = drawn(seed, 5, vocabulary)
    R = residual(logits, labels)
    share = torch.full((5,), scale)
    output = compact((R * scale).float(), labels, share, vocabulary + 7)
    assert output.index.shape == (5, vocabulary - 1)
    assert torch.allclose(rebuilt(output, labels), R.float(), atol=1e-6)


@given(SEEDS, st.integers(30, 1500), st.integers(1, 20), st.booleans())
def test_compact_conserves_every_rows_mass(
    seed: int, vocabulary: int, k: int, given_sums: bool
) -> None:
    logits, labels = drawn(seed, 5, vocabulary)
    R = residual(logits, labels).float()
    share = torch.linspace(0.5, 4.0, 5)
    scaled = share[:, None] * R
    output = compact(scaled, labels, share, k, scaled.sum(1) if given_sums else None)
    assert output.value.shape == (5, k)
    assert torch.allclose(output.label, R.gather(1, labels[:, None])[:, 0], atol=1e-6)
    assert torch.allclose(rebuilt(output, labels).sum(1), R.sum(1), atol=1e-5)
    assert torch.allclose(output.tail.sum(), torch.ones(()), atol=1e-5)
    tail = R.sum(0) - torch.zeros(vocabulary).index_add_(0, labels, output.label)
    tail.index_add_(0, output.index.flatten(), output.value.flatten(), alpha=-1)
    assert torch.allclose(output.tail * output.tail_mass.sum(), tail, atol=1e-5)


def test_rows_that_the_loss_does_not_count_are_empty_and_leave_the_tail_alone() -> None:
    logits, labels = drawn(0, 6, 90)
    R = residual(logits, labels).float()
    counted = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    output = compact(R * counted[:, None], labels, counted, 8)
    assert not rebuilt(output, labels)[counted == 0].any()
    chosen = counted > 0
    few = compact(R[chosen], labels[chosen], torch.ones(4), 8)
    assert torch.allclose(output.tail, few.tail, atol=1e-7)


def test_next_tokens_end_with_the_sample() -> None:
    tokens = torch.tensor([[5, 6, 7, 0], [0, 8, 9, 4], [0, 0, 0, 3]])
    real = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 1]]).bool()
    labels, has_next = next_tokens(tokens, real)
    assert has_next.tolist() == [
        [True, True, False, False],
        [False, True, True, False],
        [False, False, False, False],
    ]
    assert labels[has_next].tolist() == [6, 7, 9, 4]
