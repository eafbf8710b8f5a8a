"""The loss of single samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

_POSITIONS_AT_ONCE = 4096  # of one padded batch: bounds the logits in memory


def sample_losses(
    model: nn.Module, samples: Sequence[Tensor], scored: Sequence[Bool[Tensor, " t"]] | None = None
) -> Float[Tensor, " n"]:
    """Mean next-token cross-entropy of each sample, in nats per scored token; (n,) on the CPU.

    ``samples`` are 1-D token ids of any length, ``scored`` says which predictions count (all, by
    default). The model is evaluated without dropout, and left in the mode it was in.
    """
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]))
    losses = torch.full((len(samples),), float("nan"))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        while order:
            width = len(samples[order[-1]])
            count = max(1, _POSITIONS_AT_ONCE // max(width, 1))
            chosen, order = order[-count:], order[:-count]
            tokens = torch.zeros(len(chosen), width, dtype=torch.long)
            counts = torch.zeros(len(chosen), width - 1, dtype=torch.bool)
            for row, i in enumerate(chosen):
                tokens[row, : len(samples[i])] = samples[i].long()
                counts[row, : len(samples[i]) - 1] = True if scored is None else scored[i]
            tokens, counts = tokens.to(device), counts.to(device)
            with torch.no_grad():
                logits = model(input_ids=tokens).logits[:, :-1]
            nats = cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none")
            losses[chosen] = ((nats * counts).sum(1) / counts.sum(1)).cpu()
    finally:
        model.train(was_training)
    return losses
