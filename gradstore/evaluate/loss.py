"""The loss of single samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from gradstore.capture.taps import embedding_of

_LOGITS_AT_ONCE = 1 << 23  # of one padded batch: bounds memory, and stays near the caches
_IGNORED = -100


def sample_losses(
    model: nn.Module, samples: Sequence[Tensor], scored: Sequence[Bool[Tensor, " t"]] | None = None
) -> Float[Tensor, " n"]:
    """Mean next-token cross-entropy of each sample, in nats per scored token; (n,) on the CPU.

    ``samples`` are 1-D token ids of any length, ``scored`` says which predictions count (all, by
    default). The model is evaluated without dropout, and left in the mode it was in.
    """
    of_tokens = token_losses(model, samples)
    if scored is not None:
        of_tokens = [nats[counts] for nats, counts in zip(of_tokens, scored, strict=True)]
    return torch.stack([nats.mean() for nats in of_tokens]) if of_tokens else torch.zeros(0)


def token_losses(model: nn.Module, samples: Sequence[Tensor]) -> list[Float[Tensor, " t"]]:
    """Cross-entropy of each token given those before it, in nats; t is one less than the tokens.

    ``samples`` as in :func:`sample_losses`; the results are on the CPU.
    """
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]))
    losses = [torch.zeros(0)] * len(samples)
    device = next(model.parameters()).device
    positions = _LOGITS_AT_ONCE // embedding_of(model).num_embeddings
    was_training = model.training
    model.eval()
    try:
        while order:
            width = len(samples[order[-1]])
            count = max(1, positions // max(width, 1))
            chosen, order = order[-count:], order[:-count]
            tokens = torch.zeros(len(chosen), width, dtype=torch.long)
            targets = torch.full_like(tokens, _IGNORED)  # the last position predicts nothing
            for row, i in enumerate(chosen):
                length = len(samples[i])
                tokens[row, :length] = samples[i]
                targets[row, : length - 1] = samples[i][1:]
            with torch.no_grad():
                logits = model(input_ids=tokens.to(device)).logits.flatten(0, 1).float()
                nats = cross_entropy(logits, targets.to(device).flatten(), reduction="none")
            for i, row in zip(chosen, nats.view(tokens.shape).cpu(), strict=True):
                losses[i] = row[: len(samples[i]) - 1]
    finally:
        model.train(was_training)
    return losses


def log_likelihoods(model: nn.Module, samples: Sequence[Tensor]) -> Float[Tensor, " n"]:
    """Log-likelihood of each sample's tokens given its first, summed, in nats; (n,), with a graph.

    ``samples`` are 1-D token ids of any length, taken through the model in one padded batch, in the
    mode the model is in.
    """
    rows = [tokens.long() for tokens in samples]
    tokens = pad_sequence(rows, batch_first=True)
    labels = pad_sequence(rows, batch_first=True, padding_value=_IGNORED)[:, 1:]
    device = next(model.parameters()).device
    logits = model(input_ids=tokens.to(device)).logits[:, :-1].float()
    return -cross_entropy(logits.mT, labels.to(device), reduction="none").sum(1)
