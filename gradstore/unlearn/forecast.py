"""Where a path leads, told from its beginning: the first two derivatives of every sample's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradstore.influence.predictions import (
    differentiable,
    forward_derivative,
    logits_at,
    padded_batches,
)

_ASIDE = 1e-3  # of the weights' norm: how far from the start derivatives are compared


@dataclass(frozen=True)
class Forecast:
    """Samples' losses along θ + α·u (n,), in nats per token, to second order in α.

    ``slope`` is the overlap ⟨∇ℓ, u⟩ of a sample's gradient with the update, ``curvature`` the
    product uᵀ∇²ℓ u with its Hessian.
    """

    loss: Float[Tensor, " n"]
    slope: Float[Tensor, " n"]
    curvature: Float[Tensor, " n"]

    def at(self, dose: float) -> Float[Tensor, " n"]:
        """The losses expected with the update added ``dose`` times."""
        return self.loss + dose * self.slope + dose**2 / 2 * self.curvature

    def of(self, places: Sequence[int]) -> Forecast:
        """The forecast of some of the samples."""
        some = list(places)
        return Forecast(self.loss[some], self.slope[some], self.curvature[some])

    def dose_for(self, target: float) -> float | None:
        """The first α at which the mean loss is expected to meet ``target``; None if never."""
        loss, slope, curvature = (float(x.mean()) for x in (self.loss, self.slope, self.curvature))
        missing = target - loss
        inside = slope**2 + 2 * curvature * missing
        if missing <= 0 or inside < 0:
            return None
        below = slope + inside**0.5  # the root's form that doesn't cancel
        return 2 * missing / below if below > 0 else None


@torch.no_grad()
def forecast(
    network: nn.Module, updates: Mapping[str, Tensor], samples: Sequence[Tensor]
) -> Forecast:
    """The forecast for parameters moved along ``updates`` (by their names), at the model as it is.

    Directional derivatives in forward mode on both sides of it; their difference is the Hessian
    product. (Forward over forward would be exact, but PyTorch takes the derivative of a
    normalisation layer's derivative wrongly, without a word.) Raises :class:`ForgetError` for a
    model without forward derivatives.
    """
    start = {name: network.get_parameter(name).detach() for name in updates}
    aside = _ASIDE * _norm(start) / _norm(updates)
    sides = torch.zeros(2, 2, len(samples))  # of the start; losses and slopes
    with differentiable(network):
        for places, batch in padded_batches(network, samples):
            losses = partial(_losses, network, start, updates, batch)
            for side, sign in zip(sides, (-1, 1), strict=True):
                dose = torch.tensor(sign * aside, device=batch["input_ids"].device)
                value, slope = forward_derivative(network, losses, dose, torch.ones_like(dose))
                side[:, places] = torch.stack([value, slope]).to(side)
    (loss_below, slope_below), (loss_above, slope_above) = sides
    curvature = (slope_above - slope_below) / (2 * aside)
    loss = (loss_below + loss_above) / 2 - aside**2 / 2 * curvature
    return Forecast(loss, (slope_below + slope_above) / 2, curvature)


def _losses(
    network: nn.Module,
    start: Mapping[str, Tensor],
    updates: Mapping[str, Tensor],
    batch: dict[str, Tensor],
    dose: Float[Tensor, ""],
) -> Float[Tensor, " b"]:
    moved = {name: weight + dose * updates[name] for name, weight in start.items()}
    logits = logits_at(network, moved, batch)
    labels, scored = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:]
    nats = cross_entropy(logits.mT, labels, reduction="none")
    return (nats * scored).sum(1) / scored.sum(1)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors.values()]).norm())
