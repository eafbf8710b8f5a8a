"""By how much gradients shrink between the backward pass and the optimizer's step."""

from __future__ import annotations

from torch import Tensor, nn


class ClippingProbe:
    """Watches one small parameter: its gradient's norm after backward, and again at the step.

    Clipping by global norm (and unscaling by a loss scaler) multiplies every gradient by the same
    factor, so the ratio is that factor for all of them, whoever clipped.
    """

    def __init__(self, model: nn.Module, distributed: bool) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        self._parameter = min(trained, key=lambda p: p.numel())
        self._norm: Tensor | None = None
        self._handle = None
        if not distributed:  # gradients are averaged over ranks in between: no ratio to measure
            self._handle = self._parameter.register_post_accumulate_grad_hook(self._accumulated)

    def _accumulated(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._norm = parameter.grad.detach().norm()

    def applied(self) -> float:
        """The factor for the step about to be taken: 1 if nothing was clipped."""
        before, self._norm = self._norm, None
        if before is None or self._parameter.grad is None or not float(before):
            return 1.0
        ratio = float(self._parameter.grad.detach().norm() / before)
        return 1.0 if abs(ratio - 1) < 1e-6 else ratio

    def remove(self) -> None:
        """Stop watching."""
        if self._handle is not None:
            self._handle.remove()
