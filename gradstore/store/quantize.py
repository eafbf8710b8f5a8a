"""Factors in eight bits: whole multiples of a step that follows each row's own size.

A row x of d numbers is kept as the codes round(x / s) with s = rms(x) / 24. At equal bits, a step
that follows the root mean square rather than the largest entry makes the worst row nearly as good
as the median one. A row with an entry beyond 127 steps (an outlier channel), or whose error is
larger than is allowed, is kept as it is, in bfloat16: its step is zero, and so are its codes. All
three arrays have a row for each row of the matrix, so that they are cut like any other.
"""

from __future__ import annotations

from jaxtyping import BFloat16, Bool, Float32, Int8
from torch import Tensor
from torch.linalg import vector_norm

STEPS = 24  # in a row's root mean square: 6.7 bits of entropy where entries are Gaussian
ERROR = 0.0138  # |stored − x| ≤ ERROR · |x|, so that their cosine is at least 0.9999
_LARGEST = 127
_ROWS = 1024  # at once: what is made in between stays near the cache


def is_factor(name: str) -> bool:
    """Whether an array of a segment holds one side of a gradient's outer products."""
    return name in ("D", "H") or name.endswith((".A", ".B"))


def parts_of(name: str) -> tuple[str, str]:
    """The arrays beside a factor's codes: steps, and the rows that have none."""
    return f"{name}.step", f"{name}.wide"


def encode(
    matrix: BFloat16[Tensor, "t d"],
) -> tuple[Int8[Tensor, "t d"], Float32[Tensor, " t"], BFloat16[Tensor, "t d"]]:
    """Codes, steps and the rows that have none, with zeros for the rows that do."""
    codes, steps = matrix.new_zeros(matrix.shape).char(), matrix.new_zeros(len(matrix)).float()
    wide = matrix.new_zeros(matrix.shape)
    for start in range(0, len(matrix), _ROWS):
        rows = slice(start, start + _ROWS)
        x = matrix[rows].float()
        size = vector_norm(x, dim=1, dtype=x.double().dtype)
        step = (size / (STEPS * x.shape[1] ** 0.5)).float()
        code = (x / step[:, None]).round_()
        fits = code.abs().amax(1) <= _LARGEST  # not a number, as of a row of zeros: does not
        code[~fits] = 0
        codes[rows] = code.char()
        error = vector_norm(decode(codes[rows], step, None).float() - x, dim=1, dtype=size.dtype)
        fits &= error <= ERROR * size
        codes[rows][~fits] = 0
        steps[rows] = step.where(fits, 0)
        wide[rows][~fits] = matrix[rows][~fits]
    return codes, steps, wide


def lacking(steps: Float32[Tensor, " t"]) -> Bool[Tensor, " t"]:
    """Which rows are kept in bfloat16."""
    return steps == 0


def decode(
    codes: Int8[Tensor, "t d"],
    steps: Float32[Tensor, " t"],
    wide: BFloat16[Tensor, "t d"] | None,
) -> BFloat16[Tensor, "t d"]:
    """The rows; ``wide`` may be left out where no step is zero."""
    rows = (codes * steps[:, None]).bfloat16()
    return rows if wide is None else wide.where(lacking(steps)[:, None], rows)
