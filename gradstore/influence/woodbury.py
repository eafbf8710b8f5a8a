"""Newton steps in the curvature that stored gradients give: an n×n solve for n of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gradstore.factored import FactoredGradient

_ROWS = 256  # of every gradient, worked on together: bounds memory at n × 256 × d doubles
_RANK = 1e-12  # of the largest eigenvalue: below are directions that only rounding tells apart


def woodbury(
    gradients: Sequence[FactoredGradient],
    g: Float[Tensor, "V d"],
    diagonal: Float[Tensor, "V d"] | float,
    strength: float,
) -> Float[Tensor, "V d"]:
    """(M + λ F)⁻¹ g with F = Σ gᵢ gᵢᵀ / n, the empirical Fisher matrix of n gradients.

    M is ``diagonal``, positive, and λ ≥ 0 is ``strength``. With G (n × V·d) the gradients as rows
    and K = G M⁻¹ Gᵀ, this is M⁻¹ (g − Gᵀ (K + n/λ)⁻¹ G M⁻¹ g) (Woodbury 1950; for language models
    Gu et al., arXiv 2403.10557). At ``math.inf`` it is the limit M⁻¹ (g − Gᵀ K⁺ G M⁻¹ g): of the
    step M⁻¹ g what is orthogonal to every gradient, nearest to it in the metric of M, so that to
    first order no loss behind the gradients changes.

    Gradients may repeat or depend on each other, so K is built and solved in double precision.
    They are multiplied out twice, some rows of V at a time. On the device of ``g``, in its dtype.
    Raises ``ValueError`` for a λ or M out of range, or a gradient of another weight.
    """
    m = torch.as_tensor(diagonal, device=g.device).expand(g.shape)
    if not strength >= 0 or not bool((m > 0).all()):
        raise ValueError(
            f"strength is {strength}, the least of the diagonal {float(m.min()):.3g}; the first "
            "must not be negative, the second must be positive"
        )
    for gradient in gradients:
        if gradient.shape != tuple(g.shape):
            raise ValueError(f"gradients of different weights: {gradient.shape}, {tuple(g.shape)}")
    if not gradients or not strength:
        return g / m
    count = len(gradients)
    gram = torch.zeros(count, count, dtype=torch.float64, device=g.device)
    along = gram.new_zeros(count)
    chunks = [slice(start, start + _ROWS) for start in range(0, len(g), _ROWS)]
    for chunk in chunks:
        slab = _slab(gradients, chunk, g)
        scaled = slab / m[chunk].double().flatten()
        gram.addmm_(slab, scaled.T)
        along.addmv_(scaled, g[chunk].double().flatten())
    values, vectors = torch.linalg.eigh(gram)
    inverse = torch.where(values > _RANK * values[-1], 1 / (values + count / strength), 0)
    weights = vectors @ (inverse * (vectors.T @ along))
    out = torch.empty_like(g)
    for chunk in chunks:
        taken = (weights @ _slab(gradients, chunk, g)).view(g[chunk].shape)
        out[chunk] = (g[chunk].double() - taken) / m[chunk].double()
    return out


def _slab(
    gradients: Sequence[FactoredGradient], chunk: slice, like: Float[Tensor, "V d"]
) -> Float[Tensor, "n r*d"]:
    """Some rows of all gradients, flattened, in double precision, on the device of ``like``."""
    slab = torch.zeros(len(gradients), *like[chunk].shape, dtype=torch.float64)
    for out, gradient in zip(slab, gradients, strict=True):
        for term in gradient.terms:
            right = term.B.double()
            if term.index is None:
                out.addmm_(term.value[:, chunk].double().T, right)
            else:
                hit = (term.index >= chunk.start) & (term.index < chunk.stop)
                at = hit.nonzero()[:, 0]
                values = term.value[hit].double()[:, None] * right[at]
                out.index_add_(0, term.index[hit] - chunk.start, values)
    return slab.flatten(1).to(like.device)
