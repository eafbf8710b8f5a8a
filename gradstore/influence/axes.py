"""Sketches along the axes on which they differ most: a search that is asked often reads these.

Gradients of real records lie in few directions: who scores highest by whole sketches is among those
who lead along 256 principal axes (``benchmarks/influence_scan.py``), which are read in an eighth of
the time. Where records lie in all directions alike, the axes tell as much as 256 numbers drawn at
random. They make the sum of squared errors of products the least that 256 numbers can (Eckart and
Young 1936, "The approximation of one matrix by another of lower rank").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gradstore.influence.sketches import Sketches, multiplied

AXES = 256
_SEEN = 8192  # sketches that the axes are found from
_ROWS = 1024  # turned together


@dataclass(frozen=True)
class Reduced:
    """Sketches as seen along orthonormal ``axes``, in float16: 512 bytes each, held in memory."""

    axes: Float[Tensor, "m k"]
    rows: Float[Tensor, "n k"]

    def products(self, vectors: Float[Tensor, "m c"]) -> Float[Tensor, "n c"]:
        """What :meth:`Sketches.products` are about; float32."""
        return multiplied([self.rows], self.axes.T @ vectors)


def reduced(sketches: Sketches) -> Reduced | None:
    """Sketches along their principal axes; None for those that are hardly longer than that.

    All of them are read, once: for a million of 2,048 numbers that takes half a minute.
    """
    size, count = sketches.projection.size, len(sketches.lengths)
    if size < 2 * AXES or count < AXES:
        return None
    seen = sketches.some(torch.arange(0, count, -(-count // _SEEN)).numpy())
    with torch.random.fork_rng(devices=[]):  # the axes are found from a random start
        torch.manual_seed(0)
        _, _, axes = torch.svd_lowrank(seen, AXES)
    rows, start = torch.empty(count, AXES, dtype=torch.float16), 0
    for block in sketches.blocks:
        for part in block.split(_ROWS):
            rows[start : start + len(part)] = part.float() @ axes
            start += len(part)
    return Reduced(axes, rows)
