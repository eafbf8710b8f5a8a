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
    """Rows of a segment, D in the type it is stored in, which may be mapped memory.

    ``owner`` (t,) numbers the place each row belongs to.
    """

    owner: Int[Tensor, " t"]
    inputs: Int[Tensor, " t"]
    D: Float[Tensor, "t d"]
    output: Output | None

    def to(self, device: str) -> Chunk:
        """The same with what is multiplied on a device; ``owner`` stays."""
        output = self.output and self.output.to(device)
        return Chunk(self.owner, self.inputs.to(device), self.D.to(device), output)


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

    def to(self, device: str) -> Output:
        """The same with what is multiplied on a device; ``tail_row`` stays."""
        H, index, value, mass = (  # noqa: N806
            of.to(device) for of in (self.H, self.index, self.value, self.mass)
        )
        return Output(H, index, value, mass, self.tail_row)


def chunks(
    segment: SegmentReader, places: Sequence[Place], limit: int, sides: Sides | None = None
) -> Iterator[Chunk]:
    """The rows of places, ``limit`` at once, in the order they are stored.

    ``sides="input"`` leaves the output side unread.
    """
    where = _Where.of(places)
    both = has_output(places, sides)
    for start in range(0, int(where.count.sum()), limit):
        yield _read(segment, where.within(start, start + limit), both)


def read(segment: SegmentReader, place: Place, sides: Sides | None = None) -> Chunk:
    """All rows of one place, be they none."""
    return _read(segment, _Where.of([place]), has_output([place], sides))


def has_output(places: Sequence[Place], sides: Sides | None) -> bool:
    """Whether places of one segment have an output side that is to be read."""
    return sides != "input" and bool(places) and places[0].tail_row is not None


# -- inside ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Where:
    """Places as columns, in the order of their rows; each has one (n,) array."""

    number: NDArray[np.int64]
    first: NDArray[np.int64]
    count: NDArray[np.int64]
    tokens: NDArray[np.int64]
    tail: NDArray[np.int64]

    @classmethod
    def of(cls, places: Sequence[Place]) -> _Where:
        facts = [(p.row_start, p.rows, p.token_start, p.tail_row or 0) for p in places]
        columns = np.array(facts, np.int64).reshape(len(places), 4)
        number = columns[:, 0].argsort(kind="stable")
        return cls(number, *columns[number].T)

    def within(self, start: int, stop: int) -> _Where:
        """What is left of them if of all their rows, counted on, ``start`` to ``stop`` remain."""
        ends = self.count.cumsum()
        kept = slice(ends.searchsorted(start, "right"), ends.searchsorted(stop, "left") + 1)
        ends, count = ends[kept], self.count[kept]
        before = (start - ends + count).clip(min=0)
        return _Where(
            self.number[kept],
            self.first[kept] + before,
            count - before - (ends - stop).clip(min=0),
            self.tokens[kept] + before,
            self.tail[kept],
        )

    def runs(self) -> Iterator[tuple[int, int]]:
        """From which to which they follow one another without a gap."""
        gaps = np.flatnonzero(self.first[1:] != (self.first + self.count)[:-1]) + 1
        return pairwise([0, *gaps.tolist(), len(self.first)])


def _read(segment: SegmentReader, where: _Where, both: bool) -> Chunk:
    """All rows of some places, one run of them after another."""
    rows, spans, at, held = [], [], [], 0
    last, ends = where.first + where.count, where.tokens + where.count
    for begin, end in where.runs():
        rows.append((int(where.first[begin]), int(last[end - 1])))
        # a record has a token more than it has rows
        span = int(where.tokens[begin]), int(ends[end - 1]) + 1
        at.append(where.tokens[begin:end] - span[0] + held)
        held += span[1] - span[0]
        spans.append(span)

    def stored(name: str, runs: Sequence[tuple[int, int]] = rows, *, copy: bool = True) -> Tensor:
        parts = [segment.tensor(name, *run, copy=copy) for run in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    count, tokens = where.count, stored("tokens", spans).int()
    # repeated by NumPy: torch takes longer than to multiply
    ahead = np.concatenate(at) - (count.cumsum() - count)
    positions = torch.from_numpy(ahead.repeat(count) + np.arange(count.sum()))
    output = None
    if both:
        labels = tokens.index_select(0, positions + 1)
        R = stored("R_value")  # noqa: N806
        mass = R[:, 1].clone()
        R[:, 1] = R[:, 0]  # the label's value moves beside the other entries'
        output = Output(
            H=stored("H", copy=False),
            index=torch.cat([labels[:, None], stored("R_index")], dim=1),
            value=R[:, 1:],
            mass=mass,
            tail_row=torch.from_numpy(where.tail.repeat(count)),
        )
    owner = torch.from_numpy(where.number.repeat(count))
    return Chunk(owner, tokens.index_select(0, positions), stored("D", copy=False), output)
