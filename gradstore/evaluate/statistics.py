"""Samples of figures against each other: membership, Kolmogorov-Smirnov, bootstrap intervals.

All scores of membership are such that a higher one means a better known record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap interval (95 %, percentiles)."""

    value: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def as_tuple(self) -> tuple[float | None, float | None, float | None]:
        """Value and interval, None for what does not exist."""
        parts = (self.value, self.low, self.high)
        value, low, high = (None if math.isnan(part) else part for part in parts)
        return value, low, high


def estimate(
    statistic: Callable[..., float], *samples: ArrayLike, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """``statistic(*samples)`` with its interval: each sample is drawn anew with replacement.

    Figures that belong together go into one sample, as rows. A sample of one cannot vary: what the
    interval then says is only how much the others do (Efron 1979); without others it is NaN. NaN
    draws are left out.
    """
    arrays = [np.asarray(sample) for sample in samples]
    if all(len(array) < 2 for array in arrays):
        return Estimate(statistic(*arrays), math.nan, math.nan)
    draw = np.random.default_rng(seed)
    places = [draw.integers(0, len(a), (resamples, len(a))) for a in arrays]
    drawn = [
        statistic(*[a[at] for a, at in zip(arrays, row, strict=True)])
        for row in zip(*places, strict=True)
    ]
    kept = [value for value in drawn if not math.isnan(value)]
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(kept, tails).tolist() if kept else (math.nan, math.nan)
    return Estimate(statistic(*arrays), low, high)


def mean(values: NDArray[np.float64]) -> float:
    """The mean, NaN of nothing."""
    return float(values.mean()) if len(values) else math.nan


def ratio(pairs: NDArray[np.float64]) -> float:
    """Sum of the first column over that of the second: a mean per token of (sums, counts)."""
    total, count = pairs.sum(0)
    return float(total / count)


def auc(members: ArrayLike, strangers: ArrayLike) -> float:
    """Chance that a member's score is above a stranger's, ties counting half.

    0.5: they cannot be told apart; 1: the forgotten look like members; 0: they stand out the other
    way, which reveals them as well.
    """
    inside, outside = np.asarray(members), np.sort(np.asarray(strangers))
    below = np.searchsorted(outside, inside, "left") + np.searchsorted(outside, inside, "right")
    return float(below.mean() / (2 * len(outside)))


def true_positive_rate(members: ArrayLike, strangers: ArrayLike, false: float = 0.01) -> float:
    """Share of members found by the threshold that takes at most ``false`` of the strangers.

    With fewer than 1 / ``false`` strangers that is the highest of their scores (Carlini et al.
    2022, arXiv 2112.03570).
    """
    outside = np.sort(np.asarray(strangers))[::-1]
    threshold = outside[int(false * len(outside))]  # so many are above it, ties aside
    return float((np.asarray(members) > threshold).mean())


def privleak(of_model: float, of_reference: float) -> float:
    """100 · ((1 - AUC) - (1 - AUC_ref)) / (1 - AUC_ref), of two :func:`auc`; 0 is ideal.

    Below 0 the forgotten still look like members, above it they stand out (MUSE, arXiv 2407.06460,
    equation 3; theirs has Min-K% as score). NaN where the reference's AUC is 1. There is no default
    for the reference.
    """
    if of_reference == 1:
        return math.nan
    return 100 * (of_reference - of_model) / (1 - of_reference)


def kolmogorov_smirnov(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Two-sample Kolmogorov-Smirnov: greatest distance of the distributions, and its exact p.

    p is the chance of at least that distance if both are from one continuous distribution: the
    share of lattice paths from (0, 0) to (n, m) that leave the band (Hodges 1957). With few figures
    even different distributions rarely give a small one.
    """
    a, b = np.sort(np.asarray(one)), np.sort(np.asarray(other))
    n, m = len(a), len(b)
    every = np.concatenate([a, b])
    gaps = m * np.searchsorted(a, every, "right") - n * np.searchsorted(b, every, "right")
    greatest = int(np.abs(gaps).max())
    inside = np.zeros(m + 1)  # chance that a random path to (i, j) stayed inside
    for i in range(n + 1):
        for j in range(m + 1):
            if abs(i * m - j * n) >= greatest:
                inside[j] = 0.0
            elif i or j:
                from_left = inside[j - 1] * j if j else 0.0
                inside[j] = (inside[j] * i + from_left) / (i + j)
            else:
                inside[j] = 1.0
    return greatest / (n * m), float(1 - inside[m]) if greatest else 1.0


def distance(pairs: NDArray[np.float64]) -> float:
    """Greatest distance of two figures' distributions over the same records; pairs are (n, 2).

    That of :func:`kolmogorov_smirnov`. Records drawn anew are fewer different ones, so an interval
    of it leans upward, and does not reach 0 where nothing differs.
    """
    one, other = np.sort(pairs, axis=0).T
    every = pairs.ravel()
    gaps = np.searchsorted(one, every, "right") - np.searchsorted(other, every, "right")
    return float(np.abs(gaps).max() / len(pairs))
