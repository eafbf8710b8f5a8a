"""What the backward pass knows, in a few small tensors.

The gradient at the logits of next-token cross-entropy is ``share · (softmax − one-hot)``. From it
and the logits themselves come, without a second pass and without a softmax over the batch: the
factor by which each sample's own summed loss entered the loss that was differentiated, each
sample's loss, and a compact form of R = softmax − one-hot.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_FAN = 8  # columns whose maximum stands for them, at each level of the selection
_ROWS = 64  # of a block
_NARROW = 1024  # below this many columns a plain top-k is as fast
_MANY = 512  # rows, half of which show the tail's shape as well as all do
_PROBES = 32  # vocabulary entries looked at to find each position's log-normaliser
_SURE = 80.0  # nats between two logits, beyond which float32 has no room for their ratio
_SLIGHT = 1e-6  # weight, in shares, of a position where 1 − p_label rounds to 0


@dataclass(frozen=True)
class CompactOutput:
    """R of n positions: its ``k`` largest entries, the label's, and how the rest is spread."""

    index: Int[Tensor, "n k"]
    value: Float[Tensor, "n k"]
    label: Float[Tensor, " n"]
    tail_mass: Float[Tensor, " n"]
    tail: Float[Tensor, " V"]


@dataclass(frozen=True)
class PositionFacts:
    """What two entries of each row of a cross-entropy's gradient tell; all (n,).

    ``weight`` says how precisely the share is known there: it grows with 1 − p_label, and is 0
    where the prediction is so sure that nothing is left to measure (the loss is then taken as 0).
    ``pulled`` is False where another entry than the label's is negative: no cross-entropy's is.
    """

    share: Tensor
    loss: Tensor
    weight: Tensor
    pulled: Tensor


def largest(matrix: Float[Tensor, "n V"], k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest entries of each row and their columns, unsorted: an exact top-k.

    The k largest entries lie in the k groups of columns with the largest maxima, so all but those
    groups drop out after one vectorised pass; groups are found by the same rule. A quarter of the
    CPU time of ``torch.topk`` at a vocabulary of 50,257, in blocks of rows that stay in the cache.
    """
    blocks = matrix.split(_ROWS) if matrix.device.type == "cpu" else (matrix,)
    found = [_largest(block, k) for block in blocks]
    return torch.cat([value for value, _ in found]), torch.cat([column for _, column in found])


def _largest(matrix: Float[Tensor, "n V"], k: int) -> tuple[Tensor, Tensor]:
    n, width = matrix.shape
    groups = width // _FAN
    if width <= _NARROW or groups <= k:
        return _top(matrix, k)
    even = groups * _FAN  # group g holds columns g, g + groups, g + 2·groups, ...
    maxima = matrix[:, :even].view(n, _FAN, groups).amax(1)
    _, best = _largest(maxima, k)
    steps = torch.arange(_FAN, device=matrix.device) * groups
    columns = (best[:, :, None] + steps).view(n, -1)
    rest = torch.arange(even, width, device=matrix.device).expand(n, -1)
    columns = torch.cat([columns, rest], dim=1)
    value, at = _top(matrix.gather(1, columns), k)
    return value, columns.gather(1, at)


def _top(matrix: Float[Tensor, "n w"], k: int) -> tuple[Tensor, Tensor]:
    """A plain top-k; NumPy selects with vector instructions on the CPU, torch does not."""
    if matrix.device.type != "cpu" or matrix.dtype not in (torch.float32, torch.float64):
        return matrix.topk(k, dim=-1, sorted=False)
    at = torch.from_numpy(np.argpartition(matrix.numpy(), -k, axis=1)[:, -k:])
    return matrix.gather(1, at), at


def compact(
    R: Float[Tensor, "n V"],  # noqa: N803
    labels: Int[Tensor, " n"],
    share: Float[Tensor, " n"],
    k: int,
    row_sums: Float[Tensor, " n"] | None = None,
) -> CompactOutput:
    """Compress ``R`` as differentiated (share · (softmax − one-hot)) into the own-loss scale.

    Selection is on signed values: the label's entry, the only negative one, is kept apart. Rows of
    a cross-entropy sum to 0, which gives the tail's mass for free; pass ``row_sums`` where the
    head's output is transformed before the softmax. The tail's shape is one distribution for all n
    rows: what is left of their column sums, of every other row's where there are many.
    """
    value, index = largest(R, min(k, R.shape[1] - 1))
    label = R.gather(1, labels[:, None])[:, 0]
    own = torch.where(share > 0, 1 / share, 0.0)
    value, label = value.float() * own[:, None], label.float() * own
    seen = slice(None, None, 2 if len(R) >= _MANY else 1)
    left = (own[None, seen].to(R.dtype) @ R[seen])[0].float()
    left.index_add_(0, index[seen].flatten(), value[seen].flatten(), alpha=-1)
    left.index_add_(0, labels[seen], label[seen], alpha=-1)
    tail = left.clamp_(min=0)
    mass = -(label + value.sum(1)) if row_sums is None else row_sums * own - label - value.sum(1)
    return CompactOutput(index, value, label, mass, tail / tail.sum().clamp(min=1e-30))


def position_facts(
    logits: Float[Tensor, "n V"], gradient: Float[Tensor, "n V"], labels: Int[Tensor, " n"]
) -> PositionFacts:
    """Share and cross-entropy at each position, in closed form from two entries of a row.

    With p the softmax, ``gradient`` is s·p_j away from the label and s·(p_label − 1) at it. Since
    p_label = p_j · exp(logit_label − logit_j) for any column j,

        s = gradient_j · exp(logit_label − logit_j) − gradient_label
        loss = −log p_label = log s − log gradient_j − (logit_label − logit_j).

    So token means, accumulation, loss scaling, world size and sample weights are accounted for
    without being known. The likeliest of a few dozen columns serves as j, or of all columns where
    those few underflow.
    """
    probed = torch.arange(0, logits.shape[1], max(1, logits.shape[1] // _PROBES)).to(labels.device)
    probes = gradient[:, probed].float().masked_fill(labels[:, None] == probed, 0.0)
    best, at = probes.max(dim=1)
    column, at_label = probed[at], gradient.gather(1, labels[:, None])[:, 0].float()
    least = torch.finfo(gradient.dtype).tiny
    faint = ((best < least) & (at_label < 0)).nonzero()[:, 0]
    if len(faint):
        others = gradient[faint].float().scatter(1, labels[faint, None], 0.0)
        best[faint], column[faint] = others.max(dim=1)
    difference = (
        logits.gather(1, labels[:, None])[:, 0].float()
        - logits.gather(1, column[:, None])[:, 0].float()
    )
    sure = (best < least) | (difference > _SURE)
    share = torch.where(sure, -at_label, best * torch.exp(difference) - at_label)
    loss = torch.where(sure, 0.0, torch.log(share) - torch.log(best) - difference)
    weight = torch.where(sure, 0.0, _SLIGHT * share - at_label)
    return PositionFacts(share, loss, weight, (probes >= 0).all(1))


def next_tokens(
    tokens: Int[Tensor, "b s"], real: Bool[Tensor, "b s"]
) -> tuple[Int[Tensor, "b s"], Bool[Tensor, "b s"]]:
    """Each position's next token, and whether there is one in the sample."""
    labels = torch.roll(tokens, -1, dims=1)
    has_next = real & torch.roll(real, -1, dims=1)
    has_next[:, -1] = False
    return labels, has_next
