"""How far to take a step of a linear model, whose loss falls short by a known part of its way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn

from gradstore.evaluate.audience import Audience
from gradstore.unlearn.walk import Walk

MOST = 1.5  # times the step
_HALVINGS = 6


def further(
    network: nn.Module,
    updates: Mapping[str, Float[Tensor, "V d"]],
    samples: Sequence[Int[Tensor, " t"]],
    times: float,
) -> float:
    """The multiple of ``updates`` that raises the samples' mean loss ``times`` as far as they do.

    From 1 to ``MOST``, and 1 where the loss does not rise. ``samples`` are token ids. The network
    is left as it was. Raises :class:`ForgetError` where nothing is updated.
    """
    walk = Walk(network, updates, Audience([], {}, list(samples)))

    def loss(multiple: float) -> float:
        losses = walk.losses(multiple)
        return sum(losses) / len(losses)

    try:
        before = loss(0.0)
        aim = before + times * (loss(1.0) - before)
        return crossing(loss, aim, 1.0, MOST) if aim > before else 1.0
    finally:
        walk.go_to(0.0)


def crossing(loss: Callable[[float], float], aim: float, low: float, high: float) -> float:
    """Where between ``low`` and ``high`` a loss crosses ``aim``; ``high`` where it stays below."""
    if loss(high) < aim:
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if loss(middle) >= aim else (middle, high)
    return low
