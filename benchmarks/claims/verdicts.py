"""Figures with intervals, whether they speak for a claim, and the sentence that sums them up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table as RichTable

from gradstore.evaluate.statistics import Estimate, estimate

NAMED = 3  # comparisons that a sentence names; of more it tells how many there are


@dataclass(frozen=True)
class Finding:
    """A figure, and on which side of ``bound`` the claim has it.

    ``side`` is +1 for above, -1 for below, 0 for either. The figure speaks ``for`` or ``against``
    the claim where its whole interval lies on one side, else the question stays ``open``.
    """

    about: str
    figure: Estimate
    bound: float
    side: int

    @property
    def verdict(self) -> str:
        """``for``, ``against`` or ``open``."""
        above, below = self.figure.low > self.bound, self.figure.high < self.bound
        if not (above or below):  # also where there is no interval
            return "open"
        return "for" if self.side in (0, 1 if above else -1) else "against"


@dataclass(frozen=True)
class Table:
    """Cells as they are printed, on a terminal and on a page."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> RichTable:
        """For a terminal."""
        table = RichTable(*self.header, title=self.title)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a page."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sentence(claim: str, findings: Sequence[Finding]) -> str:
    """The claim, whether it holds, and the figures that say so.

    It holds where all that could be told speaks for it, and that is at least half.
    """
    by = {v: [f for f in findings if f.verdict == v] for v in ("for", "against", "open")}
    if by["for"] and not by["against"] and len(by["open"]) <= len(by["for"]):
        return f"{claim}: holds ({named(by['for'])}){_open(by['open'])}."
    if by["for"]:
        against = f". Does not when {named(by['against'])}" if by["against"] else ""
        return f"{claim}: holds when {named(by['for'])}{against}{_open(by['open'])}."
    if by["against"]:
        return f"{claim}: does not hold here ({named(by['against'])}){_open(by['open'])}."
    return f"{claim}: cannot be told here{_open(by['open'])}."


def named(findings: Sequence[Finding]) -> str:
    """The first few with their figures, and how many more there are."""
    said = "; ".join(f"{f.about} = {told(f.figure)}" for f in findings[:NAMED])
    more = findings[NAMED:]
    if not more:
        return said
    values = [f.figure.value for f in more]
    return f"{said}; and {len(more)} more, {min(values):.2f} to {max(values):.2f}"


def told(figure: Estimate) -> str:
    """Value and interval."""
    if math.isnan(figure.value):
        return "–"
    if math.isnan(figure.low) or figure.low == figure.value == figure.high:
        return f"{figure.value:.2f}"
    return f"{figure.value:.2f} [{figure.low:.2f}, {figure.high:.2f}]"


def interval(statistic: Callable[..., Any], values: Sequence[Any]) -> Estimate:
    """A statistic of figures, one for each (record, seed), NaN of none."""
    if not values:
        return Estimate(math.nan, math.nan, math.nan)
    return estimate(lambda drawn: float(statistic(drawn)), np.array(values, dtype=float))


def exactly(value: float) -> Estimate:
    """A figure that does not vary."""
    return Estimate(value, value, value)


def median(values: Sequence[float]) -> Estimate:
    """Their median."""
    return interval(np.median, values)


def ratio(pairs: Sequence[tuple[float, float]]) -> Estimate:
    """The geometric mean of first ÷ second over records."""
    return interval(lambda drawn: np.exp(drawn.mean()), [math.log(a / b) for a, b in pairs])


def _open(findings: Sequence[Finding]) -> str:
    return f"; {len(findings)} of the comparisons cannot be told" if findings else ""
