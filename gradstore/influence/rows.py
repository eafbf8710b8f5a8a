"""Rows of a segment as scans and sketches read them: some at once, records cut where they end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
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
    for pieces in _together(places, limit):
        yield read(segment, pieces, sides)


def read(
    segment: SegmentReader, pieces: Sequence[tuple[int, Place]], sides: Sides | None
) -> Chunk:
    """The rows of consecutive places, each with its number."""
    first, last = pieces[0][1], pieces[-1][1]
    start, stop = first.row_start, last.row_start + last.rows
    facts = [(n, p.token_start - p.row_start, -1 if p.tail_row is None else p.tail_row, p.rows)
             for n, p in pieces]  # fmt: skip
    *columns, counts = np.array(facts).T  # repeated by NumPy: torch takes longer than to multiply
    owner, ahead, tail_row = (torch.from_numpy(column.repeat(counts)) for column in columns)
    at = torch.arange(start, stop) + ahead - first.token_start
    tokens = segment.tensor("tokens", first.token_start, last.token_start + last.rows + 1).int()
    output = None
    if sides != "input" and first.tail_row is not None:
        labels, R = tokens[at + 1], segment.tensor("R_value", start, stop)  # noqa: N806
        mass = R[:, 1].clone()
        R[:, 1] = R[:, 0]  # the label's value moves beside the other entries'
        output = Output(
            H=segment.tensor("H", start, stop, copy=False),
            index=torch.cat([labels[:, None], segment.tensor("R_index", start, stop)], dim=1),
            value=R[:, 1:],
            mass=mass,
            tail_row=tail_row,
        )
    return Chunk(owner, tokens[at], segment.tensor("D", start, stop, copy=False), output)


def _together(places: Sequence[Place], limit: int) -> Iterator[list[tuple[int, Place]]]:
    """Places with their numbers, cut to ``limit`` rows, those that follow one another in one list.

    A part of a record is a place too: its tokens begin as many tokens later as its rows.
    """
    pieces: list[tuple[int, Place]] = []
    held = 0
    for number in sorted(range(len(places)), key=lambda n: places[n].row_start):
        place = places[number]
        for offset in range(0, place.rows, limit):
            rows = min(limit, place.rows - offset)
            start = place.row_start + offset
            if pieces and (
                held + rows > limit or pieces[-1][1].row_start + pieces[-1][1].rows != start
            ):
                yield pieces
                pieces, held = [], 0
            piece = Place(start, rows, place.token_start + offset, place.tail_row)
            pieces.append((number, piece))
            held += rows
    if pieces:
        yield pieces
