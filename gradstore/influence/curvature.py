"""How firmly the records that stay hold a model where it is: the Gauss-Newton matrix of some of
its weights, never formed, and the linear systems it appears in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vjp

from gradstore.influence.predictions import Predictions, forward_derivative

Operator = Callable[[Tensor], Tensor]


class GaussNewton:
    """v → G v for the mean loss per token of some samples, at the model as it is now.

    G = mean over predictions of Jᵀ (diag p − p pᵀ) J, with J the Jacobian of the logits with
    respect to the n weights that ``names`` name, as in :class:`Predictions`, all together: the
    generalized Gauss-Newton matrix, which for cross-entropy is the Fisher information (Martens,
    "New insights and perspectives on the natural gradient method", 2020, §8-9). A product costs a
    forward pass with its derivative, another forward pass, and a backward pass over the samples.
    """

    def __init__(
        self, network: nn.Module, samples: Sequence[Tensor], names: Iterable[str] = ("embedding",)
    ) -> None:
        self._predictions = Predictions(network, samples, names)

    def __call__(self, v: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """G v, for v (n,) as :func:`flat` makes it, or of a single weight's shape.

        Raises :class:`ForgetError` for a model without forward derivatives.
        """
        return self._predictions.mean(self._of_batch, v)

    def _of_batch(self, batch: dict[str, Tensor], v: Tensor) -> Tensor:
        logits, weights = partial(self._predictions.logits, batch), self._predictions.start
        z, dz = forward_derivative(self._predictions.network, logits, weights, v)
        p = z.softmax(-1)
        pulled = p * (dz - (p * dz).sum(-1, keepdim=True))
        pulled *= batch["attention_mask"][:, 1:, None]
        product: Tensor = vjp(logits, weights)[1](pulled)[0]
        return product


@dataclass(frozen=True)
class Solution:
    """``x`` that solves A x = b, and the relative residual |Ax − b| ÷ |b| as it went.

    ``residuals`` begins with that of x = 0, and has one more after each iteration.
    """

    x: Tensor
    residuals: tuple[float, ...]

    @property
    def iterations(self) -> int:
        """How many it took."""
        return len(self.residuals) - 1

    @property
    def residual(self) -> float:
        """The last."""
        return self.residuals[-1]


def conjugate_gradients(
    operator: Operator, b: Tensor, diagonal: Tensor | float, *, iterations: int, tolerance: float
) -> Solution:
    """Solve A x = b for a symmetric positive definite A, preconditioned by a diagonal.

    Hestenes and Stiefel 1952, in the form of Nocedal and Wright, algorithm 5.3. Stopping early
    damps what is held most firmly first, so a few iterations are useful already. Residuals are in
    the preconditioner's norm. Raises ``ValueError`` where A turns out not to be positive definite.
    """
    x, r = torch.zeros_like(b), b.clone()
    z = r / diagonal
    p, squared = z.clone(), float((r * z).sum())
    first, residuals = squared, [1.0 if squared else 0.0]
    while len(residuals) <= iterations and squared > tolerance**2 * first:
        image = operator(p)
        curvature = float((p * image).sum())
        if not curvature > 0:
            raise ValueError(
                f"the matrix is not positive definite (curvature {curvature:.3g} after "
                f"{len(residuals) - 1} iterations): damp it more, or use the Gauss-Newton matrix"
            )
        step = squared / curvature
        x += step * p
        r -= step * image
        z = r / diagonal
        before, squared = squared, float((r * z).sum())
        p = z + squared / before * p
        residuals.append((squared / first) ** 0.5)
    return Solution(x, tuple(residuals))
