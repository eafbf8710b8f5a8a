"""How far to take a step of a linear model, whose loss falls short by a known part of its way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradstore.capture.layers import parameter
from gradstore.evaluate.loss import sample_losses

MOST = 1.5  # times the step
_HALVINGS = 6


def further(
    network: nn.Module,
    updates: Mapping[str, Float[Tensor, "V d"]],
    samples: Sequence[Int[Tensor, " t"]],
    share: float,
) -> float:
    """The multiple of ``updates`` that raises the samples' mean loss ``share`` times as far as one.

    From 1 to ``MOST``, and 1 where the loss does not rise. ``samples`` are token ids. The network
    is left as it was.
    """
    moves = []
    for name, update in updates.items():
        weight = parameter(network, name)
        start = weight.detach().clone()
        moves.append((weight, start, update.view(start.shape).to(start)))

    def loss(multiple: float) -> float:
        with torch.no_grad():
            for weight, start, update in moves:
                weight.copy_(start).add_(update, alpha=multiple)
        return float(sample_losses(network, samples).mean())

    before, low, high = loss(0.0), 1.0, MOST
    aim = before + share * (loss(1.0) - before)
    for _ in range(_HALVINGS if aim > before else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if loss(middle) >= aim else (middle, high)
    loss(0.0)
    return low
