"""Directions that use nothing stored, or nothing at all: what a stored one has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradstore.capture.taps import embedding_of
from gradstore.errors import ForgetError
from gradstore.evaluate.loss import log_likelihoods


def fresh(network: nn.Module, tokens: Sequence[Tensor]) -> Float[Tensor, "V d"]:
    """The gradient of the samples' summed loss at the weights as they are now, in nats.

    With respect to the token embedding, both sides of it where the head is tied; over all tokens of
    each sample but the first, without dropout. (V, d), on the network's device; ``tokens`` are 1-D
    ids. Raises :class:`ForgetError` where the embedding is frozen.
    """
    weight = embedding_of(network).weight
    if not weight.requires_grad:
        raise ForgetError(
            "the embedding is frozen, so it has no gradient: call "
            "`model.get_input_embeddings().weight.requires_grad_()` first"
        )
    total, was_training = torch.zeros_like(weight), network.training
    network.eval()
    try:
        for sample in tokens:  # one by one: a request is short, its records may not be
            loss = -log_likelihoods(network, [sample]).sum()
            total += torch.autograd.grad(loss, weight)[0]
    finally:
        network.train(was_training)
    return total


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
