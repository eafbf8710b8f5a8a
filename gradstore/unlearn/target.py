"""The loss that samples would have if they had never been trained on, without retraining."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# 1 over how far undoing the optimizer's steps brings a loss towards that of a retrained model:
# measured on single records, sets and whole authors of two texts, see docs/forgetting.md.
SHARES = (1.0, 1.4, 1.9)  # least, usual, most
_LEAST, _MOST = 1 / 3, 1.5  # of the way to the held-out estimate: too high where siblings stay


@dataclass(frozen=True)
class Target:
    """A mean loss of the samples, in nats per token, and the range that it is known to.

    ``source`` is ``asked``, ``undo`` or ``held-out``; ``each`` and ``ranges`` are the samples' own,
    none if asked.
    """

    loss: float
    low: float
    high: float
    source: str
    each: tuple[float, ...] = ()
    ranges: tuple[tuple[float, float], ...] = ()

    @classmethod
    def asked(cls, loss: float) -> Target:
        """A loss that was asked for."""
        return cls(loss, loss, math.inf, "asked")


def from_undoing(
    before: Sequence[float],
    undone: Sequence[float],
    shares: tuple[float, float, float] = SHARES,
) -> Target:
    """The estimate where the optimizer's steps can be undone: ``undone`` are the losses then.

    ``shares`` are the least, usual and most that the way to a retrained model is of the way to
    ``undone``; `gradstore calibrate` measures them.
    What undoing leaves knows of everything that stays, siblings of the samples included; it falls
    short of retraining by a third of the way, for the layers it does not touch.
    """
    losses = [
        [b + (u - b) * share for b, u in zip(before, undone, strict=True)] for share in shares
    ]
    low, middle, high = (sum(each) / len(each) for each in losses)
    ranges = tuple((min(ends), max(ends)) for ends in zip(losses[0], losses[2], strict=True))
    return Target(middle, min(low, high), max(low, high), "undo", tuple(losses[1]), ranges)


def from_held_out(
    forget: Sequence[float], members: Sequence[float], held_out: Sequence[float]
) -> Target:
    """The estimate from samples that were never trained on.

    Carries the members' loss distribution onto the held-out one by mean and spread, sample by
    sample. It assumes that nothing which stays reveals the forgotten: where near-copies or
    siblings remain it is too high, so that its range begins at a third of the way.
    """
    mean_m, spread_m = _moments(members)
    mean_h, spread_h = _moments(held_out)
    ratio = spread_h / spread_m if spread_m > 0 else 1.0
    each = tuple(mean_h + (loss - mean_m) * ratio for loss in forget)
    before, loss = sum(forget) / len(forget), sum(each) / len(each)
    (low, high), *ranges = (
        (start + _LEAST * way, start + _MOST * way)
        for start, end in zip((before, *forget), (loss, *each), strict=True)
        for way in (max(0.0, end - start),)
    )
    return Target(loss, low, high, "held-out", each, tuple(ranges))


def _moments(values: Sequence[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
