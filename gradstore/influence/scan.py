"""Products of stored gradients with queries, a segment at a time, never building a dense gradient.

A record's gradient is Σ_t a_t ⊗ b_t over its positions: for the input side a_t is one token and b_t
a row of D, for the output side a_t is a row of R, a few entries and a share of the tail, and b_t a
row of H. A query Q (V, d) = LᵀW of rank r gives

    ⟨g, Q⟩ = Σ_t (L a_t) · (W b_t),

a look-up of a few rows of r numbers and a product with a thin matrix for each position. Where the
rank is no smaller than the width, W is the identity and L is Q itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from gradstore.errors import InfluenceError
from gradstore.factored import FactoredGradient, Term
from gradstore.store.distant import Distant
from gradstore.store.record import Sides
from gradstore.store.segment import SegmentReader

MEMORY = 512 << 20
_ROWS = 2048  # positions worked on together
_TOUCHED = 128  # rows of a gradient squared together: they stay in the cache
_FEWEST = 16
_TAILS = 8  # multiplied together
_COLUMNS = 256  # of L, looked up together: beyond it rows of L leave the cache


class Place(NamedTuple):
    """Where a record lies in its segment: columns of the catalog's ``exposures``."""

    row_start: int
    rows: int
    token_start: int
    tail_row: int | None


@dataclass(frozen=True)
class Lens:
    """Queries as a scan multiplies by them; ``ranks`` says how many columns belong to each.

    ``left`` (V, r), ``right`` (r, d), or None for the identity of a dense query.
    """

    left: Float[Tensor, "V r"]
    right: Float[Tensor, "r d"] | None
    ranks: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.left.nbytes + (0 if self.right is None else self.right.nbytes)


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a segment. ``owner`` (t,) numbers the place each row belongs to.

    D and H are overwritten when the next chunk is read.
    """

    owner: Int[Tensor, " t"]
    inputs: Int[Tensor, " t"]
    D: Float[Tensor, "t d"]
    output: Output | None


@dataclass(frozen=True)
class Output:
    """The output side of a chunk: R's entries with the label's first, and the tails' numbers."""

    H: Float[Tensor, "t d"]
    index: Int[Tensor, "t k+1"]
    value: Float[Tensor, "t k+1"]
    mass: Float[Tensor, " t"]
    tail_row: Int[Tensor, " t"]


def lenses(
    gradients: Sequence[FactoredGradient], divisor: Float[Tensor, "V d"] | None = None
) -> Iterator[Lens]:
    """Queries in the form that is multiplied fastest, in their order, several in one where thin.

    With a ``divisor`` each entry of a query is divided by its own, which makes it dense.
    """
    waiting: list[tuple[Tensor, Tensor]] = []
    for gradient in gradients:
        terms = [_merged(term, gradient.shape) for term in gradient.terms]
        rank = sum(len(term.B) for term in terms)
        dense = divisor is not None or 2 * rank > gradient.shape[1]
        if waiting and (dense or rank + sum(len(right) for _, right in waiting) > _COLUMNS):
            yield _stacked(waiting)
            waiting = []
        if dense:
            left = gradient.dense() if divisor is None else gradient.dense() / divisor
            yield Lens(left, None, (gradient.shape[1],))
        else:
            waiting.append(_factors(terms, gradient.shape[0], rank))
    if waiting:
        yield _stacked(waiting)


def score_segment(
    path: Path | Distant,
    places: Sequence[Place],
    through: Sequence[Lens],
    sides: Sides | None = None,
    memory: int = MEMORY,
) -> Float[Tensor, "places queries"]:
    """⟨gradient, query⟩ for records of one segment and all queries of the lenses; float64.

    ``sides="input"`` leaves the records' output side unread; else it is used where it is stored.
    What is held beside the lenses and the scores stays within ``memory`` bytes less the lenses'.
    A pure function of what it is given: any executor can map it over segments, also on machines
    that have not the store, where ``path`` is a :class:`Distant`. Raises
    :class:`InfluenceError` if the lenses leave no memory.
    """
    scores = torch.zeros(len(places), sum(len(lens.ranks) for lens in through), dtype=torch.float64)
    scan = _Segment(path, places, through, sides, memory)
    for chunk in scan.chunks():
        parts = scan.products(chunk)
        scores.index_add_(0, chunk.owner, sum(parts[1:], parts[0]).double())
    return scores


def contributions(
    path: Path, place: Place, lens: Lens, sides: Sides | None = None, memory: int = MEMORY
) -> Float[Tensor, "rows 2"]:
    """What each position of one record adds to its product with a query; float64.

    The first column is the input side's (the token that was read there), the second the output
    side's (the prediction that was made there). Their sum is :func:`score_segment`'s score.
    """
    scan = _Segment(path, [place], [lens], sides, memory)
    found = []
    for chunk in scan.chunks():
        parts = [part[:, 0].double() for part in scan.products(chunk)]
        found.append(torch.stack([*parts, *[torch.zeros_like(parts[0])] * (2 - len(parts))], dim=1))
    return torch.cat(found)


def norms_segment(
    path: Path | Distant, places: Sequence[Place], sides: Sides | None = None, memory: int = MEMORY
) -> Float[Tensor, " places"]:
    """The norm of each record's gradient; float64.

    Raises :class:`InfluenceError` for a record that, read whole, takes more than ``memory`` bytes.
    """
    segment = SegmentReader(path)
    held: dict[str, Tensor] = {}
    longest = max((place.rows for place in places), default=0)
    fullest = next((place for place in places if place.tail_row is not None), None)
    one = fullest or next(iter(places), None)
    if one and (needed := _bytes_of_norm(segment, one, longest, sides)) > memory:
        raise InfluenceError(
            f"the norm of a record of {longest} tokens takes more than the {memory >> 20} MB "
            f"allowed; `gradstore top --memory {(needed >> 20) + 1}MB` allows it"
        )
    squares = [_square(_read(segment, [(0, place)], sides, held), segment) for place in places]
    return torch.tensor(squares, dtype=torch.float64).clamp_(min=0).sqrt_()


def chunks(
    segment: SegmentReader, places: Sequence[Place], limit: int, sides: Sides | None = None
) -> Iterator[Chunk]:
    """The rows of places, in float32, at most ``limit`` at once, in the order they are stored."""
    held: dict[str, Tensor] = {}
    for pieces in _together(places, limit):
        yield _read(segment, pieces, sides, held)


# -- inside ----------------------------------------------------------------------------------


class _Segment:
    """One segment being multiplied with lenses."""

    def __init__(
        self,
        path: Path | Distant,
        places: Sequence[Place],
        through: Sequence[Lens],
        sides: Sides | None,
        memory: int,
    ) -> None:
        self._reader, self._places, self._sides = SegmentReader(path), places, sides
        self._through, self._memory = through, memory
        self._tails: dict[int, list[Tensor]] = {}

    def chunks(self) -> Iterator[Chunk]:
        """The places' rows in as few reads as memory allows."""
        if not self._places:
            return
        first = _read(self._reader, [(0, self._places[0]._replace(rows=0))], self._sides, {})
        yield from chunks(self._reader, self._places, self._rows_at_once(first), self._sides)

    def products(self, chunk: Chunk) -> list[Float[Tensor, "t queries"]]:
        """Each position's part in every product: of the input side, and of the output side."""
        read = [
            _multiplied(lens, lens.left.index_select(0, chunk.inputs), chunk.D)
            for lens in self._through
        ]
        if (output := chunk.output) is None:
            return [torch.cat(read, dim=1)]
        made, (tails, at) = [], output.tail_row.unique_consecutive(return_inverse=True)
        for number, lens in enumerate(self._through):
            looked_up = embedding_bag(
                output.index, lens.left, per_sample_weights=output.value, mode="sum"
            )
            shared = torch.stack([self._tail(row, number) for row in tails.tolist()])
            looked_up.addcmul_(output.mass[:, None], shared[at])
            made.append(_multiplied(lens, looked_up, output.H))
        return [torch.cat(read, dim=1), torch.cat(made, dim=1)]

    def _tail(self, row: int, number: int) -> Float[Tensor, " r"]:
        """A micro-batch's tail as a lens shows it; a few at once, as records follow one another."""
        if row not in self._tails:
            tails = self._reader.tensor("tail", row, min(row + _TAILS, self._reader.rows("tail")))
            seen = [tails.float() @ lens.left for lens in self._through]
            self._tails = {row + n: [of[n] for of in seen] for n in range(len(tails))}
        return self._tails[row][number]

    def _rows_at_once(self, empty: Chunk) -> int:
        held = sum(lens.nbytes for lens in self._through)
        widest = max((lens.left.shape[1] for lens in self._through), default=0)
        queries, entries, tails = sum(len(lens.ranks) for lens in self._through), 0, 0
        if self._through and empty.output is not None:
            entries = empty.output.index.shape[1]
            tails = 8 * _TAILS * len(self._through[0].left)  # as read, unpacked and in float32
        # D and H as read, unpacked and in float32; two looked-up rows and products; both sides'
        # parts, and their sum in float64; R's entries; places
        row = 16 * empty.D.shape[1] + 16 * widest + 24 * queries + 20 * entries + 64
        if (rows := (self._memory - held - tails) // row) < _FEWEST:
            raise InfluenceError(
                f"the query takes {held >> 20} MB of the {self._memory >> 20} MB allowed and "
                "leaves no room to read records; allow "
                f"{(held + tails + _ROWS * row >> 20) + 1} MB (--memory)"
            )
        return min(rows, _ROWS)


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


def _read(
    segment: SegmentReader,
    pieces: Sequence[tuple[int, Place]],
    sides: Sides | None,
    held: dict[str, Tensor],
) -> Chunk:
    """Rows of consecutive places, in float32; D and H where those before them were ``held``."""
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
        labels, R = tokens[at + 1], segment.tensor("R_value", start, stop).float()  # noqa: N806
        mass = R[:, 1].clone()
        R[:, 1] = R[:, 0]  # the label's value moves beside the other entries'
        output = Output(
            H=_unpacked(held, "H", segment.tensor("H", start, stop, copy=False)),
            index=torch.cat([labels[:, None], segment.tensor("R_index", start, stop)], dim=1),
            value=R[:, 1:],
            mass=mass,
            tail_row=tail_row,
        )
    D = _unpacked(held, "D", segment.tensor("D", start, stop, copy=False))  # noqa: N806
    return Chunk(owner, tokens[at], D, output)


def _unpacked(held: dict[str, Tensor], name: str, rows: Tensor) -> Float[Tensor, "t d"]:
    """Rows in float32, in memory that is kept: fresh pages cost more than what is put there."""
    if name not in held or len(held[name]) < len(rows):
        held[name] = torch.empty(rows.shape)
    return held[name][: len(rows)].copy_(rows)


def _bytes_of_norm(segment: SegmentReader, place: Place, rows: int, sides: Sides | None) -> int:
    """Most bytes held for the norm of a record of so many rows in a segment."""
    empty = _read(segment, [(0, place._replace(rows=0))], sides, {})
    width, entries, tail = empty.D.shape[1], 1, 0
    if empty.output is not None:
        entries += empty.output.index.shape[1]
        tail = 8 * len(segment.tensor("tail", place.tail_row or 0, (place.tail_row or 0) + 1)[0])
    # D and H as read, unpacked, in float32 and joined; entries with their positions, sorted
    return rows * (32 * width + 56 * entries + 64) + tail + 8 * _TOUCHED * width


def _square(record: Chunk, segment: SegmentReader) -> float:
    """‖g‖² = ‖S‖² + 2 ⟨S, tail ⊗ m⟩ + ‖tail‖² ‖m‖² of a whole record, m = Σ mass_t H_t.

    S is what sparse entries make of the rows they touch: sums of rows of D and H, looked up by
    position, a few rows at a time, as the scan looks rows of a query up by token.
    """
    t = len(record.D)
    index, value, B = record.inputs[:, None], torch.ones(t, 1), record.D  # noqa: N806
    position = torch.arange(t, dtype=torch.int32)[:, None]
    tail = shared = None
    if (output := record.output) is not None:
        index, value = torch.cat([index, output.index], 1), torch.cat([value, output.value], 1)
        position = torch.cat([position, (position + t).expand_as(output.index)], dim=1)
        B = torch.cat([B, output.H])  # noqa: N806
        row = int(output.tail_row[0])
        tail = segment.tensor("tail", row, row + 1)[0].float()
        shared = output.mass @ output.H
    index, order = index.flatten().sort()
    position, value = position.flatten()[order], value.flatten()[order]
    touched, counts = index.unique_consecutive(return_counts=True)
    ends, total, start = counts.cumsum(0), 0.0, 0
    for tokens, offsets, end in zip(
        touched.split(_TOUCHED),
        (ends - counts).split(_TOUCHED),
        ends.split(_TOUCHED),
        strict=True,
    ):
        part = slice(start, int(end[-1]))
        S = embedding_bag(  # noqa: N806
            position[part], B, (offsets - start).int(), per_sample_weights=value[part], mode="sum"
        )
        start = part.stop
        total += float(S.square().sum(dtype=torch.float64))
        if tail is not None and shared is not None:
            total += 2 * float(tail[tokens] @ (S @ shared))
    if tail is not None and shared is not None:
        total += float((tail @ tail) * (shared @ shared))
    return total


def _merged(term: Term, shape: tuple[int, int]) -> Term:
    """A term with one row for all positions that read the same token."""
    if term.index is None or term.index.shape[1] != 1:
        return term
    return Term.one_hot(*FactoredGradient([term], shape).rows())


def _factors(terms: Sequence[Term], count: int, rank: int) -> tuple[Tensor, Tensor]:
    """L (V, r) and W (r, d) of a sum of terms."""
    left, start = torch.zeros(count, rank), 0
    for term in terms:
        columns = torch.arange(start, start + len(term.B))
        start += len(term.B)
        if term.index is None:
            left[:, columns] = term.value.T
        else:
            where = (term.index, columns[:, None].expand_as(term.index))
            left.index_put_(where, term.value, accumulate=True)
    return left, torch.cat([term.B for term in terms])


def _stacked(factors: Sequence[tuple[Tensor, Tensor]]) -> Lens:
    lefts, rights = zip(*factors, strict=True)
    return Lens(torch.cat(lefts, dim=1), torch.cat(rights), tuple(len(right) for right in rights))


def _multiplied(
    lens: Lens,
    looked_up: Float[Tensor, "t r"],
    B: Float[Tensor, "t d"],  # noqa: N803
) -> Float[Tensor, "t queries"]:
    """(L a_t) · (W b_t) for every position and query; overwrites ``looked_up``."""
    looked_up.mul_(B if lens.right is None else B @ lens.right.T)
    return torch.stack([of.sum(1) for of in looked_up.split(lens.ranks, dim=1)], dim=1)
