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

    ``forecast`` is what the path's start foretold of ``forget``.
    """

    dose: float
    forget: float
    retained: float | None
    holdout: float | None
    forecast: float | None = None


Measure = Callable[[float], Point]


@dataclass(frozen=True)
class Path:
    """Every point measured, in order of dose, and the one chosen (dose 0: none was acceptable)."""

    points: list[Point]
    chosen: Point
    reached: bool


def follow_multiple(measure: Measure, multiple: float, limit: float | None) -> Path:
    """Scan around an asked dose; go no further than the held-out loss allows.

    ``limit`` is the largest acceptable rise of the held-out loss. If the asked dose exceeds it, the
    largest dose found that doesn't is chosen instead.
    """
    points = {dose: measure(dose) for dose in (0.0, *(multiple * x for x in AROUND))}
    start = points[0.0]
    if _within(points[multiple], start, limit):
        return Path(_in_order(points), points[multiple], True)
    low = max(p.dose for p in points.values() if p.dose < multiple and _within(p, start, limit))
    high = min(p.dose for p in points.values() if p.dose > low)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        points[middle] = measure(middle)
        if _within(points[middle], start, limit):
            low = middle
        else:
            high = middle
    return Path(_in_order(points), points[low], False)


def follow_target(measure: Measure, target: float, first: float, limit: float | None) -> Path:
    """Double the dose from ``first`` until the target loss is crossed, then close in on it.

    The path need not be monotone: the first crossing counts. Stops where the held-out loss has
    risen by more than ``limit``, and then chooses the nearest point to the target below that.
    """
    points = {0.0: measure(0.0)}
    start = points[0.0]
    low, high, dose = 0.0, math.inf, first
    for _ in range(_DOUBLINGS):
        if start.forget >= target:
            break
        points[dose] = measure(dose)
        if points[dose].forget >= target or not _within(points[dose], start, limit):
            high = dose
            break
        low, dose = dose, dose * 2
    for _ in range(_HALVINGS if high < math.inf else 0):
        middle = (low + high) / 2
        points[middle] = measure(middle)
        if points[middle].forget >= target or not _within(points[middle], start, limit):
            high = middle
        else:
            low = middle
    allowed = [p for p in points.values() if _within(p, start, limit)]
    chosen = min(allowed, key=lambda p: abs(p.forget - target))
    reached = any(p.forget >= target for p in allowed)
    return Path(_in_order(points), chosen, reached)


def _within(point: Point, start: Point, limit: float | None) -> bool:
    if not math.isfinite(point.forget):
        return False
    if limit is None or point.holdout is None or start.holdout is None:
        return True
    return point.holdout - start.holdout <= limit


def _in_order(points: dict[float, Point]) -> list[Point]:
    return [points[dose] for dose in sorted(points)]
