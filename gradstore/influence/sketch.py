"""Sketches: each gradient in a thousand numbers whose products estimate those of the gradients.

A gradient is Σ_t a_t ⊗ b_t over the positions of its record (see :mod:`gradstore.influence.scan`).
TensorSketch (Pham & Pagh 2013, "Fast and scalable polynomial kernels via explicit feature maps")
hashes the entry (i, j) of such a matrix into bucket h(i) + h'(j) mod m with the sign s(i) s'(j).
What it makes of an outer product is the circular convolution of what it makes of its factors, so

    sketch(g) = F⁻¹ Σ_t F(A_t) ∘ F(B_t),    A_t = Σ_i s(i) a_ti e_h(i),    B_t = Σ_j s'(j) b_tj e_j

never builds the matrix. Here h'(j) = j mod m: no two columns of a row meet while d ≤ m. Then
E ⟨sketch(g), sketch(q)⟩ = ⟨g, q⟩ over the seeds, and its deviation falls with 1 / √m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from gradstore.factored import FactoredGradient
from gradstore.influence.rows import Place, chunks
from gradstore.store.record import Sides
from gradstore.store.segment import SegmentReader

_ROWS = 256  # positions transformed together: they stay in the cache


@dataclass(frozen=True)
class Projection:
    """A random linear map from gradients of one shape to ``size`` numbers, drawn by ``seed``."""

    size: int
    seed: int
    shape: tuple[int, int]

    def of(self, gradient: FactoredGradient) -> Float[Tensor, " m"]:
        """The sketch of a gradient."""
        found = torch.zeros(self.size // 2 + 1, dtype=torch.complex64)
        for term in gradient.terms:
            for start in range(0, len(term.B), _ROWS):
                rows = slice(start, start + _ROWS)
                index = None if term.index is None else term.index[rows]
                left = self._left(index, term.value[rows].float())
                found += (left * self._right(term.B[rows].float())).sum(0)
        sketched: Tensor = torch.fft.irfft(found, n=self.size)
        return sketched

    def of_segment(
        self, path: Path, places: Sequence[Place], sides: Sides | None = None
    ) -> Float[Tensor, "places m"]:
        """The sketches of records of one segment. A pure function: any executor can map it."""
        segment, tail = SegmentReader(path), (-1, torch.empty(0))
        found = torch.zeros(len(places), self.size // 2 + 1, dtype=torch.complex64)
        for chunk in chunks(segment, places, _ROWS, sides):
            ones = torch.ones(len(chunk.D), 1)
            parts = self._left(chunk.inputs[:, None], ones) * self._right(chunk.D)
            if (output := chunk.output) is not None:
                H = self._right(output.H)  # noqa: N806
                left = self._left(output.index, output.value)
                for row in output.tail_row.unique_consecutive().tolist():
                    if row != tail[0]:
                        shared = segment.tensor("tail", row, row + 1).float()
                        tail = row, self._left(None, shared)[0]
                    left += output.mass.float().where(output.tail_row == row, 0)[:, None] * tail[1]
                parts.addcmul_(left, H)
            found.index_add_(0, chunk.owner, parts)
        sketched: Tensor = torch.fft.irfft(found, n=self.size)
        return sketched

    # -- inside ------------------------------------------------------------------------------

    @cached_property
    def _drawn(self) -> tuple[Int[Tensor, " V"], Float[Tensor, " V"], Float[Tensor, " d"]]:
        """Bucket and sign of each row, sign of each column."""
        draw = np.random.RandomState(self.seed)  # the one whose stream NumPy promises to keep
        rows, columns = self.shape
        bucket = torch.from_numpy(draw.randint(0, self.size, rows, dtype=np.int64))
        signs = 2.0 * torch.from_numpy(draw.randint(0, 2, rows + columns)) - 1
        return bucket, signs[:rows].float(), signs[rows:].float()

    def _left(
        self, index: Int[Tensor, "t k"] | None, value: Float[Tensor, "t k"]
    ) -> Complex[Tensor, "t f"]:
        """F(A_t); without an ``index`` the values are those of all rows."""
        bucket, sign, _ = self._drawn
        found = torch.zeros(len(value), self.size)
        if index is None:
            found.index_add_(1, bucket, value * sign)
        else:
            index = index.long()
            found.scatter_add_(1, bucket[index], value.float() * sign[index])
        transformed: Tensor = torch.fft.rfft(found)
        return transformed

    def _right(self, B: Float[Tensor, "t d"]) -> Complex[Tensor, "t f"]:  # noqa: N803
        """F(B_t)."""
        signed = B.to(torch.float32, copy=True).mul_(self._drawn[2])
        if signed.shape[1] > self.size:  # columns beyond the last bucket start again at the first
            signed = pad(signed, (0, -signed.shape[1] % self.size))
            signed = signed.view(len(B), -1, self.size).sum(1)
        transformed: Tensor = torch.fft.rfft(signed, n=self.size)
        return transformed
