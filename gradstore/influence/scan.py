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

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from gradstore.errors import InfluenceError
from gradstore.influence.lens import Lens
from gradstore.influence.rows import MEMORY, Chunk, Place, chunks, has_output
from gradstore.store.record import Sides
from gradstore.store.segment import SegmentReader, Source

_ROWS = 4096  # positions worked on together
_IN_CACHE = 256  # rows of a dense query that stay there from being looked up to being summed
_FEWEST = 16
_TAILS = 32  # multiplied together: a lens is read once for all of them


def score_segment(
    source: Source,
    places: Sequence[Place],
    through: Sequence[Lens],
    sides: Sides | None = None,
    memory: int = MEMORY,
) -> Float[Tensor, "places queries"]:
    """⟨gradient, query⟩ for records of one segment and all queries of the lenses; float64.

    Multiplied where the lenses lie, a GPU or the processor; the scores are on the processor.

    ``sides="input"`` leaves the records' output side unread; else it is used where it is stored.
    What is held beside the lenses and the scores stays within ``memory`` bytes less the lenses'.
    A pure function of what it is given: any executor can map it over segments, also on machines
    that have not the store, given a :class:`gradstore.store.distant.Distant`. Raises
    :class:`InfluenceError` if the lenses leave no memory.
    """
    scores = torch.zeros(len(places), sum(len(lens.ranks) for lens in through), dtype=torch.float64)
    scan = _Segment(source, places, through, sides, memory)
    for chunk in scan.chunks():
        parts = scan.products(chunk)
        scores.index_add_(0, chunk.owner, sum(parts[1:], parts[0]).cpu().double())
    return scores


def contributions(
    source: Source, place: Place, lens: Lens, sides: Sides | None = None, memory: int = MEMORY
) -> Float[Tensor, "rows 2"]:
    """What each position of one record adds to its product with a query; float64.

    The first column is the input side's (the token that was read there), the second the output
    side's (the prediction that was made there). Their sum is :func:`score_segment`'s score.
    """
    scan = _Segment(source, [place], [lens], sides, memory)
    found = []
    for chunk in scan.chunks():
        parts = [part[:, 0].cpu().double() for part in scan.products(chunk)]
        found.append(torch.stack([*parts, *[torch.zeros_like(parts[0])] * (2 - len(parts))], dim=1))
    return torch.cat(found)


# -- inside ----------------------------------------------------------------------------------


class _Segment:
    """One segment being multiplied with lenses."""

    def __init__(
        self,
        source: Source,
        places: Sequence[Place],
        through: Sequence[Lens],
        sides: Sides | None,
        memory: int,
    ) -> None:
        self._reader, self._places, self._sides = SegmentReader.at(source), places, sides
        self._through, self._memory = through, memory
        self._device = through[0].device if through else "cpu"
        self._tails: dict[int, list[Tensor]] = {}

    def chunks(self) -> Iterator[Chunk]:
        """The places' rows in as few reads as memory allows."""
        if not self._places:
            return
        yield from chunks(self._reader, self._places, self._rows_at_once(), self._sides)

    def products(self, chunk: Chunk) -> list[Float[Tensor, "t queries"]]:
        """Each position's part in every product: of the input side, and of the output side."""
        chunk = chunk.to(self._device)
        read = [_looked_up(lens, chunk) for lens in self._through]
        if (output := chunk.output) is None:
            return [torch.cat(read, dim=1)]
        made, (tails, at) = [], output.tail_row.unique_consecutive(return_inverse=True)
        index, value = output.index, output.value.float()
        at, mass = at[:, None].to(self._device), output.mass[:, None].float()
        for number, lens in enumerate(self._through):
            shared = torch.stack([self._tail(row, number) for row in tails.tolist()])
            seen = [
                _weighted(of, index, value).add_(_weighted(tail, at, mass))
                for of, tail in zip(lens.tables, lens.split(shared), strict=True)
            ]
            made.append(_multiplied(lens, seen, output.H))
        return [torch.cat(read, dim=1), torch.cat(made, dim=1)]

    def _tail(self, row: int, number: int) -> Float[Tensor, " r"]:
        """A micro-batch's tail as a lens shows it; a few at once, as records follow one another."""
        if row not in self._tails:
            tails = self._reader.tensor("tail", row, min(row + _TAILS, self._reader.rows("tail")))
            tails = tails.to(self._device).float()
            seen = [
                torch.cat([tails @ table for table in lens.tables], dim=1) for lens in self._through
            ]
            self._tails = {row + n: [of[n] for of in seen] for n in range(len(tails))}
        return self._tails[row][number]

    def _rows_at_once(self) -> int:
        held = sum(lens.nbytes for lens in self._through)
        widest = max((lens.columns for lens in self._through), default=0)
        queries, entries, tails = sum(len(lens.ranks) for lens in self._through), 0, 0
        if self._through and has_output(self._places, self._sides):
            entries = self._columns("R_value") - 1  # one is the tail's mass
            tails = 8 * _TAILS * len(self._through[0].tables[0])  # as read, and in float32
        # D and H as read, and one of them in the lens's type; a row looked up, the tail's share
        # and a product; both sides' parts, and their sum in float64; R's entries; places
        row = 12 * self._columns("D") + 12 * widest + 24 * queries + 20 * entries + 64
        if (rows := (self._memory - held - tails) // row) < _FEWEST:
            raise InfluenceError(
                f"the query takes {held >> 20} MB of the {self._memory >> 20} MB allowed and "
                "leaves no room to read records; allow "
                f"{(held + tails + _ROWS * row >> 20) + 1} MB (--memory)"
            )
        return min(rows, _ROWS)

    def _columns(self, name: str) -> int:
        return self._reader.tensor(name, 0, 0).shape[1]


def _weighted(
    table: Float[Tensor, "n c"], index: Int[Tensor, "t k"], value: Float[Tensor, "t k"]
) -> Float[Tensor, "t c"]:
    """Sums of a table's rows, those of an ``index`` times a ``value``."""
    found: Tensor = embedding_bag(index, table, per_sample_weights=value, mode="sum")
    return found


def _looked_up(lens: Lens, chunk: Chunk) -> Float[Tensor, "t queries"]:
    """Products of the input side: a row of L for each position."""
    rows = _IN_CACHE if lens.right is None and lens.device == "cpu" else len(chunk.D)
    parts = [
        _multiplied(lens, [of.index_select(0, inputs) for of in lens.tables], D)
        for inputs, D in zip(chunk.inputs.split(rows), chunk.D.split(rows), strict=True)
    ]
    return torch.cat(parts)


def _multiplied(
    lens: Lens,
    looked_up: Sequence[Float[Tensor, "t _"]],
    B: Float[Tensor, "t d"],  # noqa: N803
) -> Float[Tensor, "t queries"]:
    """(L a_t) · (W b_t) for every position and query, from the columns of L a_t; overwrites them.

    In float32, but for W b_t.
    """
    right = B if lens.right is None else B.to(lens.right.dtype) @ lens.right.T
    products = [a.mul_(b) for a, b in zip(looked_up, lens.split(right), strict=True)]
    if lens.right is None:
        return torch.stack([of.sum(1) for of in products]).sum(0)[:, None]
    whole = products[0] if len(products) == 1 else torch.cat(products, dim=1)
    return torch.stack([of.sum(1) for of in whole.split(lens.ranks, dim=1)], dim=1)
