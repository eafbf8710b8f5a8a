"""Directions that use nothing stored, or nothing at all: what a stored one has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import grad

from gradstore.capture.layers import matrix, parameter
from gradstore.errors import ForgetError
from gradstore.evaluate.loss import log_likelihoods


def fresh(network: nn.Module, tokens: Sequence[Tensor]) -> Float[Tensor, "V d"]:
    """The gradient of the samples' summed loss at the token embedding as it is now, in nats.

    Both sides of it where the head is tied; as in :func:`gradients`.
    """
    return gradients(network, tokens, ["embedding"])["embedding"]


def gradients(
    network: nn.Module, tokens: Sequence[Tensor], weights: Sequence[str]
) -> dict[str, Float[Tensor, "rows columns"]]:
    """The gradients of the samples' summed loss at the weights as they are now, in nats.

    ``weights`` are those that :meth:`Record.gradients` names, a bias as a matrix of one row; over
    all tokens of each sample but the first, without dropout. On the network's device; ``tokens``
    are 1-D ids. Raises :class:`ForgetError` where one of them is frozen.
    """
    of = {name: parameter(network, name) for name in weights}
    for name, weight in of.items():
        if not weight.requires_grad:
            raise ForgetError(
                f"{name} is frozen, so it has no gradient: call `requires_grad_()` on it first"
            )
    total, was_training = [torch.zeros_like(weight) for weight in of.values()], network.training
    network.eval()
    try:
        for sample in tokens:  # one by one: a request is short, its records may not be
            loss = -log_likelihoods(network, [sample]).sum()
            for sum_, gradient in zip(total, grad(loss, list(of.values())), strict=True):
                sum_ += gradient
    finally:
        network.train(was_training)
    return {name: matrix(sum_) for name, sum_ in zip(of, total, strict=True)}


def random(raw: Float[Tensor, "V d"], tokens: Sequence[Tensor], seed: int) -> Float[Tensor, "V d"]:
    """Gaussian rows at the samples' input tokens, zero elsewhere, with the norm of ``raw``.

    These are the rows that the input side of :func:`~gradstore.unlearn.direction.raw` touches.
    ``tokens`` are 1-D ids; the same ``seed`` draws the same.
    """
    places = torch.cat([sample[:-1].long() for sample in tokens]).unique()
    noise = torch.randn(len(places), raw.shape[1], generator=torch.Generator().manual_seed(seed))
    update = torch.zeros_like(raw)
    update[places] = (noise * (raw.norm() / noise.norm())).to(raw)
    return update
