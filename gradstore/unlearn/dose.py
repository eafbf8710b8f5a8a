"""How far to go: the path along a direction is measured, and a dose chosen on it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

AROUND = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # multiples of an asked dose that are scanned
_DOUBLINGS, _HALVINGS = 24, 6


@dataclass(frozen=True)
class Dose:
    """What was asked for: a multiple of the direction, or a mean loss to reach (None: estimate)."""

    text: str
    multiple: float | None = None
    target: float | None = None

    @classmethod
    def parse(cls, text: str) -> Dose:
        """Read a ``--dose`` value; raises ``ValueError`` saying what is allowed."""
        if match := re.fullmatch(r"target(?::(.+))?", text):
            number, field = match[1], "target"
        else:
            number, field = text, "multiple"
        if number is None:
            return cls(text)
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise ValueError(
                f"{text!r} is no dose; expected a positive number, target, or target:NATS"
            )
        return cls(text, **{field: value})


@dataclass(frozen=True)
class Point:
    """Mean losses (nats per token) with the direction added ``dose`` times.

    ``worst`` is the largest rise of a single sample that stays, ``forecast`` what the path's start
    foretold of ``forget``; ``neighbours`` are those that stay and the update hits most.
    """

    dose: float
    forget: float
    retained: float | None
    holdout: float | None
    worst: float | None = None
    forecast: float | None = None
    neighbours: float | None = None


@dataclass(frozen=True)
class Limits:
    """The damage that is acceptable, in nats per token; None: any.

    ``holdout`` bounds the rise of the mean held-out loss, ``single`` that of any one sample that
    stays and is measured, ``neighbours`` that of the mean of those that the update hits most.
    """

    holdout: float | None = None
    single: float | None = None
    neighbours: float | None = None

    def allow(self, point: Point, start: Point) -> bool:
        """Whether a point of the path keeps to them."""
        if not math.isfinite(point.forget):
            return False
        bounds = (
            (self.holdout, point.holdout, start.holdout),
            (self.neighbours, point.neighbours, start.neighbours),
            (self.single, point.worst, 0.0),
        )
        return all(
            limit is None or after is None or before is None or after - before <= limit
            for limit, after, before in bounds
        )


Measure = Callable[[float], Point]


@dataclass(frozen=True)
class Path:
    """Every point measured, in order of dose, and the one chosen (dose 0: none was acceptable).

    Where what was asked for is not ``reached``, ``ended`` says why not, None: the limits.
    """

    points: list[Point]
    chosen: Point
    reached: bool
    ended: str | None = None


def follow_multiple(measure: Measure, multiple: float, limits: Limits) -> Path:
    """Scan around an asked dose; go no further than the limits allow.

    If the asked dose exceeds them, the largest dose found that doesn't is chosen instead.
    """
    points = {dose: measure(dose) for dose in (0.0, *(multiple * x for x in AROUND))}
    start = points[0.0]
    if limits.allow(points[multiple], start):
        return Path(_in_order(points), points[multiple], True)
    low = max(p.dose for p in points.values() if p.dose < multiple and limits.allow(p, start))
    high = min(p.dose for p in points.values() if p.dose > low)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        points[middle] = measure(middle)
        if limits.allow(points[middle], start):
            low = middle
        else:
            high = middle
    return Path(_in_order(points), points[low], False)


def follow_target(measure: Measure, target: float, first: float, limits: Limits) -> Path:
    """Double the dose from ``first`` until the target loss is crossed, then close in on it.

    The path need not be monotone: the first crossing counts. Stops where the limits are exceeded,
    and then chooses the nearest point to the target below that.
    """
    points = {0.0: measure(0.0)}
    start = points[0.0]
    low, high, dose = 0.0, math.inf, first
    for _ in range(_DOUBLINGS):
        if start.forget >= target:
            break
        points[dose] = measure(dose)
        if points[dose].forget >= target or not limits.allow(points[dose], start):
            high = dose
            break
        low, dose = dose, dose * 2
    for _ in range(_HALVINGS if high < math.inf else 0):
        middle = (low + high) / 2
        points[middle] = measure(middle)
        if points[middle].forget >= target or not limits.allow(points[middle], start):
            high = middle
        else:
            low = middle
    allowed = [p for p in points.values() if limits.allow(p, start)]
    chosen = min(allowed, key=lambda p: abs(p.forget - target))
    reached = any(p.forget >= target for p in allowed)
    return Path(_in_order(points), chosen, reached)


def _in_order(points: dict[float, Point]) -> list[Point]:
    return [points[dose] for dose in sorted(points)]
