"""Rows of a segment as scans and sketches read them: some at once, records cut where they end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from gradstore.store.record import Sides
from gradstore.store.segment import SegmentReader

MEMORY = 512 << 20  # held while reading, unless told otherwise


class Place(NamedTuple):
    """Where a record lies in its segment: columns of the catalog's ``exposures``."""

    row_start: int
    rows: int
    token_start: int
    tail_row: int | None


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a segment, D in the type it is stored in, which may be mapped memory.

    ``owner`` (t,) numbers the place each row belongs to.
    """

    owner: Int[Tensor, " t"]
    inputs: Int[Tensor, " t"]
    D: Float[Tensor, "t d"]
    output: Output | None


@dataclass(frozen=True)
class Output:
    """The output side of a chunk: R's entries with the label's first, and the tails' numbers.

    In the types that are stored; H may be mapped memory.
    """

    H: Float[Tensor, "t d"]
    index: Int[Tensor, "t k+1"]
    value: Float[Tensor, "t k+1"]
    mass: Float[Tensor, " t"]
    tail_row: Int[Tensor, " t"]


def chunks(
    segment: SegmentReader, places: Sequence[Place], limit: int, sides: Sides | None = None
) -> Iterator[Chunk]:
    """The rows of places, at most ``limit`` at once, in the order they are stored.

    ``sides="input"`` leaves the output side unread.
    """
    where = _Where.of(places)
    both = sides != "input" and bool(places) and places[0].tail_row is not None
    for run in where.runs():
        for start in range(run.first[0], run.until[-1], limit):
            stop = min(start + limit, int(run.until[-1]))
            yield _read(segment, run.within(start, stop), start, stop, both)


def read(segment: SegmentReader, place: Place, sides: Sides | None = None) -> Chunk:
    """All rows of one place, be they none."""
    both = sides != "input" and place.tail_row is not None
    stop = place.row_start + place.rows
    return _read(segment, _Where.of([place]), place.row_start, stop, both)


# -- inside ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Where:
    """Places as columns, in the order of their rows; each has one (n,) array."""

    number: NDArray[np.int64]
    first: NDArray[np.int64]
    until: NDArray[np.int64]
    tokens: NDArray[np.int64]
    tail: NDArray[np.int64]

    @classmethod
    def of(cls, places: Sequence[Place]) -> _Where:
        facts = [(p.row_start, p.rows, p.token_start, p.tail_row or 0) for p in places]
        columns = np.array(facts, np.int64).reshape(len(places), 4)
        number = columns[:, 0].argsort(kind="stable")
        first, count, tokens, tail = columns[number].T
        return cls(number, first, first + count, tokens, tail)

    def runs(self) -> Iterator[_Where]:
        """Those that follow one another without a gap."""
        gaps = np.flatnonzero(self.first[1:] != self.until[:-1]) + 1
        bounds = [0, *gaps.tolist(), len(self.number)]
        for begin, end in pairwise(bounds):
            if begin < end:
                yield self._cut(begin, end)

    def within(self, start: int, stop: int) -> _Where:
        """Those of a run that have rows from ``start`` to ``stop``."""
        begin = int(self.until.searchsorted(start, "right"))
        return self._cut(begin, int(self.first.searchsorted(stop, "left")))

    def _cut(self, begin: int, end: int) -> _Where:
        columns = (self.number, self.first, self.until, self.tokens, self.tail)
        return _Where(*(column[begin:end] for column in columns))


def _read(segment: SegmentReader, where: _Where, start: int, stop: int, both: bool) -> Chunk:
    """Rows ``start`` to ``stop`` of places that follow one another."""
    counts = where.until.clip(max=stop) - where.first.clip(min=start)
    ahead = where.tokens - where.first  # a record has a token more than it has rows
    begin, end = int(start + ahead[0]), int(stop + ahead[-1] + 1)
    # repeated by NumPy: torch takes longer than to multiply
    at = torch.from_numpy((ahead - begin).repeat(counts) + np.arange(start, stop))
    tokens = segment.tensor("tokens", begin, end).int()
    output = None
    if both:
        labels = tokens.index_select(0, at + 1)
        R = segment.tensor("R_value", start, stop)  # noqa: N806
        mass = R[:, 1].clone()
        R[:, 1] = R[:, 0]  # the label's value moves beside the other entries'
        output = Output(
            H=segment.tensor("H", start, stop, copy=False),
            index=torch.cat([labels[:, None], segment.tensor("R_index", start, stop)], dim=1),
            value=R[:, 1:],
            mass=mass,
            tail_row=torch.from_numpy(where.tail.repeat(counts)),
        )
    owner = torch.from_numpy(where.number.repeat(counts))
    D = segment.tensor("D", start, stop, copy=False)  # noqa: N806
    return Chunk(owner, tokens.index_select(0, at), D, output)
