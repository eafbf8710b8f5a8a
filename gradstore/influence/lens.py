"""Queries in the form that a scan multiplies stored gradients by, and the precision it does so in.

In bfloat16 the thin matrix W of a query is rounded to eight bits, as the stored D and H are, and so
are its products with their rows; the rest is in float32. A score is then off by some 1e-4 of |g|
|q| (``benchmarks/influence_scan.py`` measures it). Processors that multiply bfloat16 themselves do
so three times as fast, and what is stored need not be unpacked. Dense queries have no W: their
scores are those of float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradstore.factored import FactoredGradient, Term
from gradstore.store.record import Sides

Precision = Literal["bfloat16", "float32"]
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_STACKED = 256  # columns of queries that are multiplied together
_COLUMNS = 128  # of a table: rows of wider ones leave the cache before they are met again


@dataclass(frozen=True)
class Lens:
    """Queries as a scan multiplies by them; ``ranks`` says how many columns belong to each.

    ``tables`` are the columns of L (V, r), side by side, in float32; ``right`` is W (r, d) as in
    :mod:`gradstore.influence.scan`, in the precision asked for, or None for the identity of a
    dense query.
    """

    tables: tuple[Float[Tensor, "V _"], ...]
    right: Float[Tensor, "r d"] | None
    ranks: tuple[int, ...]

    @classmethod
    def dense(cls, query: Float[Tensor, "V d"], sides: Sides | None = None) -> Lens:
        """A query that has no thin factors; whole where ``sides`` are of the input alone.

        There each row is looked up once.
        """
        query = query.float()
        tables = (query.contiguous(),) if sides == "input" else _tables(query)
        return cls(tables, None, (query.shape[1],))

    def split(self, beside: Float[Tensor, "n r"]) -> Sequence[Float[Tensor, "n _"]]:
        """Columns that belong to L's, as its tables have them."""
        found: Sequence[Tensor] = beside.split([of.shape[1] for of in self.tables], dim=1)
        return found

    def to(self, device: str) -> Lens:
        """The same on a device."""
        right = None if self.right is None else self.right.to(device)
        return replace(self, tables=tuple(table.to(device) for table in self.tables), right=right)

    @property
    def device(self) -> str:
        """Where records are multiplied with it."""
        return str(self.tables[0].device)

    @property
    def columns(self) -> int:
        """Of L."""
        return sum(table.shape[1] for table in self.tables)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = (*self.tables, *(() if self.right is None else (self.right,)))
        return sum(tensor.nbytes for tensor in held)


def precision_for(stored: str, device: str = "cpu") -> Precision:
    """How to multiply factors of a stored type: in bfloat16 if they are, and the device can."""
    if stored != "bfloat16":
        return "float32"
    if torch.device(device).type == "cuda":
        able = torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere, and all of AMD's
    else:
        able = multiplies_bfloat16()
    return "bfloat16" if able else "float32"


def multiplies_bfloat16() -> bool:
    """Whether this processor is known to have instructions for bfloat16, not to emulate them.

    Versions of PyTorch that don't tell count as without.
    """
    told: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(bool(told.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def lenses(
    gradients: Sequence[FactoredGradient],
    divisor: Float[Tensor, "V d"] | None = None,
    precision: Precision = "float32",
    sides: Sides | None = None,
) -> Iterator[Lens]:
    """Queries in the form that is multiplied fastest, in their order, several in one where thin.

    With a ``divisor`` each entry of a query is divided by its own, which makes it dense. ``sides``
    are those that records are to be scored by.
    """
    waiting: list[tuple[Tensor, Tensor]] = []
    for gradient in gradients:
        terms = [_merged(term, gradient.shape) for term in gradient.terms]
        rank = sum(len(term.B) for term in terms)
        dense = divisor is not None or 2 * rank > gradient.shape[1]
        if waiting and (dense or rank + sum(len(right) for _, right in waiting) > _STACKED):
            yield _stacked(waiting, precision)
            waiting = []
        if dense:
            query = gradient.dense() if divisor is None else gradient.dense() / divisor
            yield Lens.dense(query, sides)
        else:
            waiting.append(_factors(terms, gradient.shape[0], rank))
    if waiting:
        yield _stacked(waiting, precision)


# -- inside ----------------------------------------------------------------------------------


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


def _stacked(factors: Sequence[tuple[Tensor, Tensor]], precision: Precision) -> Lens:
    lefts, rights = zip(*factors, strict=True)
    right = torch.cat(rights).to(_DTYPES[precision])
    return Lens(_tables(torch.cat(lefts, dim=1)), right, tuple(len(of) for of in rights))


def _tables(left: Float[Tensor, "V r"]) -> tuple[Float[Tensor, "V _"], ...]:
    return tuple(part.contiguous() for part in left.split(_COLUMNS, dim=1))
