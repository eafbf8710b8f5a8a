"""Influence functions: what a loss would be had a record not been trained on, by second order.

At the end of training the gradients of all records cancel. Taking away a record with gradient g
(of its summed loss) moves the weights by (H + λ)⁻¹ g ÷ n, with H the Hessian of the mean loss over
the n predictions of the training data, so that a query's loss rises by

    influence = ⟨g, (H + λ)⁻¹ g_query⟩ ÷ n        (Koh and Liang 2017, equation 2, sign turned)

**Positive: training on the record lowered the query's loss**, by so many nats to first order. H may
be the exact :class:`Hessian`, or :class:`~gradstore.influence.curvature.GaussNewton`, which is
never negative. Both see the weights they are given the names of: the others are taken to stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradstore.influence.curvature import Operator, Solution, conjugate_gradients
from gradstore.influence.predictions import Predictions

_IGNORED = -100


class Hessian:
    """v → H v for the mean loss per token of some samples, at the model as it is now.

    Exact, by differentiating twice backwards (Pearlmutter 1994): twice the cost of a gradient, and
    it asks for no forward derivatives, so it serves models that ``GaussNewton`` refuses. H is with
    respect to the n weights that ``names`` name, as in :class:`Predictions`, all together. It is
    symmetric, but away from a minimum it has negative eigenvalues.
    """

    def __init__(
        self, network: nn.Module, samples: Sequence[Tensor], names: Iterable[str] = ("embedding",)
    ) -> None:
        self._predictions = Predictions(network, samples, names)

    def __call__(self, v: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """H v, for v (n,) as :func:`flat` makes it, or of a single weight's shape."""
        return self._predictions.mean(self._of_batch, v)

    @torch.enable_grad()
    def _of_batch(self, batch: dict[str, Tensor], v: Tensor) -> Tensor:
        weights = self._predictions.start.requires_grad_()
        labels = batch["input_ids"].where(batch["attention_mask"].bool(), _IGNORED)[:, 1:]
        logits = self._predictions.logits(batch, weights)
        loss = cross_entropy(logits.mT, labels, reduction="sum", ignore_index=_IGNORED)
        [gradient] = torch.autograd.grad(loss, weights, create_graph=True)
        return torch.autograd.grad((gradient * v).sum(), weights)[0]


def solve(
    curvature: Operator,
    g: Float[Tensor, "*n"],
    damping: float,
    *,
    iterations: int = 20,
    tolerance: float = 1e-2,
) -> Solution:
    """(H + λ)⁻¹ g by conjugate gradients, λ > 0 the ``damping``.

    Raises ``ValueError`` if H has eigenvalues below −λ and they are met.
    """
    return conjugate_gradients(
        lambda v: curvature(v) + damping * v, g, 1.0, iterations=iterations, tolerance=tolerance
    )


def lissa(
    curvature: Operator,
    g: Float[Tensor, "*n"],
    damping: float,
    *,
    scale: float,
    depth: int,
    tolerance: float = 0.0,
) -> Solution:
    """(H + λ)⁻¹ g by the scaled Neumann series (Agarwal et al. 2017, "LiSSA", section 3).

    x ← x + (g − (H + λ) x) / σ, from x = 0, ``depth`` times or until the residual is at most
    ``tolerance``. It converges if H + λ is positive definite and ``scale`` σ more than half of its
    largest eigenvalue; a little above that eigenvalue is safe (:func:`largest_eigenvalue`). The
    residuals tell whether it did: it stops where they are ten times what they began with.
    ``curvature`` may draw other samples at each call, as LiSSA does; residuals are then estimates.
    """
    x, size = torch.zeros_like(g), float(g.norm())
    missing, residuals = g, [1.0 if size else 0.0]
    while len(residuals) <= depth and tolerance < residuals[-1] < 10:
        x = x + missing / scale
        missing = g - curvature(x) - damping * x
        residuals.append(float(missing.norm()) / size)
    return Solution(x, tuple(residuals))


def largest_eigenvalue(curvature: Operator, like: Tensor, iterations: int = 20) -> float:
    """The eigenvalue of largest magnitude, estimated from below by power iteration."""
    generator = torch.Generator().manual_seed(0)
    v, value = torch.randn(like.shape, generator=generator).to(like), 0.0
    for _ in range(iterations):
        v = v / v.norm()
        image = curvature(v)
        value, v = float((v * image).sum()), image
        if not v.any():
            break
    return value
