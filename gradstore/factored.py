"""The gradient of one weight matrix as a sum of thin outer products.

For a linear map used at ``t`` positions, the gradient of a sample's loss is ``AᵀB``: ``A`` (t×V)
says which rows of the weight were active and how much, ``B`` (t×d) is what flowed through them.
For an embedding, ``A`` is one-hot in the token ids and ``B`` is the gradient at the embedding's
output; for an output head, ``A`` is softmax − one-hot and ``B`` the hidden states that enter it.
``A`` is kept sparse wherever it is sparse, so a 50,257×768 gradient is two matrices of a few
hundred rows, and norms, dot products and updates never build the dense one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

_ROWS_AT_ONCE = 4096  # rows of a sparse term multiplied out together: bounds memory at rows×d


class Term:
    """One outer-product sum ``AᵀB``.

    ``index`` (t, k) holds the columns of ``A`` that are kept and ``value`` (t, k) their entries;
    with ``index=None`` ``A`` is dense and ``value`` is (t, V). ``B`` is (t, d). Entries of one row
    that share a column add up.
    """

    __slots__ = ("B", "index", "value")

    def __init__(
        self,
        index: Int[Tensor, "t k"] | None,
        value: Float[Tensor, "t _"],
        B: Float[Tensor, "t d"],  # noqa: N803
    ) -> None:
        self.index = None if index is None else index.long()
        self.value, self.B = value.float(), B.float()
        if len(self.value) != len(self.B) or (
            self.index is not None and self.index.shape != self.value.shape
        ):
            shapes = [None if x is None else tuple(x.shape) for x in (index, value, B)]
            raise ValueError(f"index, value and B do not fit together: {shapes}")

    @classmethod
    def one_hot(cls, ids: Int[Tensor, " t"], B: Float[Tensor, "t d"]) -> Term:  # noqa: N803
        """The term of an embedding look-up of ``ids``."""
        return cls(ids[:, None], torch.ones(len(ids), 1, device=B.device), B)


class FactoredGradient:
    """The gradient of one (V, d) weight: a sum of :class:`Term`, computed with in float32.

    >>> import torch
    >>> g = FactoredGradient([Term.one_hot(torch.tensor([2, 0, 2]), torch.eye(3))], (5, 3))
    >>> g.rows()[0].tolist()
    [0, 2]
    >>> round(g.norm(), 4) == round(g.dense().norm().item(), 4)
    True
    """

    def __init__(self, terms: Iterable[Term], shape: tuple[int, int]) -> None:
        self.terms = tuple(terms)
        self.shape = shape
        for term in self.terms:
            if term.B.shape[1] != shape[1] or (
                term.index is None and term.value.shape[1] != shape[0]
            ):
                raise ValueError(f"a term does not fit a weight of shape {shape}")

    @classmethod
    def of_dense(cls, matrix: Float[Tensor, "V d"]) -> FactoredGradient:
        """A matrix that has no thinner factors: itself, row by row."""
        rows = torch.arange(len(matrix), device=matrix.device)
        return cls([Term.one_hot(rows, matrix)], (matrix.shape[0], matrix.shape[1]))

    def __repr__(self) -> str:
        return f"FactoredGradient(shape={self.shape}, terms={len(self.terms)})"

    # -- algebra ---------------------------------------------------------------------------

    def __mul__(self, factor: float) -> FactoredGradient:
        scaled = (Term(t.index, t.value, t.B * factor) for t in self.terms)
        return FactoredGradient(scaled, self.shape)

    __rmul__ = __mul__

    def __add__(self, other: FactoredGradient) -> FactoredGradient:
        self._same_shape(other)
        return FactoredGradient(self.terms + other.terms, self.shape)

    def __sub__(self, other: FactoredGradient) -> FactoredGradient:
        return self + other * -1.0

    @staticmethod
    def sum(gradients: Sequence[FactoredGradient]) -> FactoredGradient:
        """The sum of at least one gradient of one weight."""
        for gradient in gradients[1:]:
            gradients[0]._same_shape(gradient)
        return FactoredGradient((t for g in gradients for t in g.terms), gradients[0].shape)

    def dot(self, other: FactoredGradient) -> float:
        """``⟨self, other⟩``, the sum of products over all V×d entries, from the factors."""
        self._same_shape(other)
        total = _dot_sparse(self._sparse, other._sparse)
        for dense in other._dense:
            total = total + _dot_mixed(self._sparse, dense)
        for dense in self._dense:
            total = total + _dot_mixed(other._sparse, dense)
            for second in other._dense:
                total = total + ((dense.value @ second.value.T) * (dense.B @ second.B.T)).sum()
        return float(total)

    def along(self, direction: Float[Tensor, "V d"]) -> float:
        """``⟨self, direction⟩``: the slope of the sample's loss along a dense direction."""
        if tuple(direction.shape) != self.shape:
            raise ValueError(f"direction is {tuple(direction.shape)}, the gradient {self.shape}")
        touched, rows = self._sparse
        total = (rows * direction[touched].to(rows)).sum()
        for term in self._dense:
            total = total + ((term.value @ direction.to(term.value)) * term.B).sum()
        return float(total)

    def norm(self) -> float:
        """The Frobenius norm."""
        return math.sqrt(max(self.dot(self), 0.0))

    # -- what it looks like ----------------------------------------------------------------

    def rows(
        self, tokens: Int[Tensor, " n"] | None = None
    ) -> tuple[Int[Tensor, " n"], Float[Tensor, "n d"]]:
        """Rows of the gradient: those asked for, or those that sparse terms touch (sorted).

        Dense terms are included in every row that is returned.
        """
        touched, values = self._sparse
        if tokens is None:
            tokens, out = touched, values.clone()
        else:
            tokens = tokens.to(touched.device).long()
            out = torch.zeros(len(tokens), self.shape[1], device=values.device)
            if len(touched):
                at = torch.searchsorted(touched, tokens).clamp(max=len(touched) - 1)
                hit = touched[at] == tokens
                out[hit] = values[at[hit]]
        for dense in self._dense:
            out.addmm_(dense.value[:, tokens].T, dense.B)
        return tokens, out

    def dense(self) -> Float[Tensor, "V d"]:
        """The full matrix: for tests, small models and plots."""
        touched, values = self._sparse
        if dense := self._dense:  # made by their product: memory is written once
            left = torch.cat([term.value for term in dense])
            out = left.T @ torch.cat([term.B for term in dense])
        else:
            out = torch.zeros(self.shape, device=values.device)
        return out.index_add_(0, touched, values)

    def add_to(self, weight: Float[Tensor, "V d"], alpha: float = 1.0) -> Float[Tensor, "V d"]:
        """``weight += alpha · self`` in place, touching only the rows that change; returns it."""
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"weight is {tuple(weight.shape)}, the gradient {self.shape}")
        with torch.no_grad():
            for term in self.terms:
                if term.index is None:
                    update = term.value.to(weight.device).T @ term.B.to(weight.device)
                    weight.add_(update.to(weight.dtype), alpha=alpha)
            touched, values = self._sparse
            if len(touched):
                update = values.to(weight.device, weight.dtype)
                weight.index_add_(0, touched.to(weight.device), update, alpha=alpha)
        return weight

    # -- inside ----------------------------------------------------------------------------

    def _same_shape(self, other: FactoredGradient) -> None:
        if self.shape != other.shape:
            raise ValueError(f"gradients of different weights: {self.shape} and {other.shape}")

    @property
    def _dense(self) -> list[Term]:
        return [term for term in self.terms if term.index is None]

    @cached_property
    def _sparse(self) -> tuple[Int[Tensor, " n"], Float[Tensor, "n d"]]:
        """All sparse terms multiplied out: the rows they touch (sorted) and those rows' sums."""
        sparse = [(term.index, term.value, term.B) for term in self.terms if term.index is not None]
        if not sparse:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0, self.shape[1])
        touched, where = torch.unique(
            torch.cat([index.flatten() for index, _, _ in sparse]), return_inverse=True
        )
        out = torch.zeros(len(touched), self.shape[1], device=sparse[0][2].device)
        start = 0
        for index, value, right in sparse:
            t, k = index.shape
            at = where[start : start + t * k].view(t, k)
            start += t * k
            step = max(1, _ROWS_AT_ONCE // max(k, 1))
            for i in range(0, t, step):
                block = value[i : i + step, :, None] * right[i : i + step, None, :]
                out.index_add_(0, at[i : i + step].flatten(), block.flatten(0, 1))
        return touched, out


_Rows = tuple[Tensor, Tensor]


def _dot_sparse(a: _Rows, b: _Rows) -> Tensor:
    (tokens_a, rows_a), (tokens_b, rows_b) = a, b
    if not len(tokens_a) or not len(tokens_b):
        return rows_a.new_zeros(())
    at = torch.searchsorted(tokens_b, tokens_a).clamp(max=len(tokens_b) - 1)
    hit = tokens_b[at] == tokens_a
    return (rows_a[hit] * rows_b[at[hit]]).sum()


def _dot_mixed(a: _Rows, dense: Term) -> Tensor:
    tokens, rows = a
    return ((dense.value[:, tokens].T @ dense.B) * rows).sum()
