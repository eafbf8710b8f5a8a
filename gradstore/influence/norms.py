"""Norms of stored gradients, a segment at a time, from their factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import embedding_bag

from gradstore.errors import InfluenceError
from gradstore.influence.rows import MEMORY, Chunk, Place, read
from gradstore.store.record import Sides
from gradstore.store.segment import SegmentReader, Source

_TOUCHED = 128  # rows of a gradient squared together: they stay in the cache


def norms_segment(
    source: Source, places: Sequence[Place], sides: Sides | None = None, memory: int = MEMORY
) -> Float[Tensor, " places"]:
    """The norm of each record's gradient; float64.

    Raises :class:`InfluenceError` for a record that, read whole, takes more than ``memory`` bytes.
    """
    segment = SegmentReader.at(source)
    longest = max((place.rows for place in places), default=0)
    fullest = next((place for place in places if place.tail_row is not None), None)
    one = fullest or next(iter(places), None)
    if one and (needed := _bytes(segment, one, longest, sides)) > memory:
        raise InfluenceError(
            f"the norm of a record of {longest} tokens takes more than the {memory >> 20} MB "
            f"allowed; `gradstore top --memory {(needed >> 20) + 1}MB` allows it"
        )
    squares = [_square(read(segment, place, sides), segment) for place in places]
    return torch.tensor(squares, dtype=torch.float64).clamp_(min=0).sqrt_()


def _bytes(segment: SegmentReader, place: Place, rows: int, sides: Sides | None) -> int:
    """Most bytes held for the norm of a record of so many rows in a segment."""
    empty = read(segment, place._replace(rows=0), sides)
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
    index, value, B = record.inputs[:, None], torch.ones(t, 1), record.D.float()  # noqa: N806
    position = torch.arange(t, dtype=torch.int32)[:, None]
    tail = shared = None
    if (output := record.output) is not None:
        index, value = (
            torch.cat([index, output.index], 1),
            torch.cat([value, output.value.float()], 1),
        )
        position = torch.cat([position, (position + t).expand_as(output.index)], dim=1)
        B = torch.cat([B, output.H.float()])  # noqa: N806
        row = int(output.tail_row[0])
        tail = segment.tensor("tail", row, row + 1)[0].float()
        shared = output.mass.float() @ B[t:]
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
