"""The dot product of activations and gradients, arXiv 2406.09391's cheap influence score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradstore.capture.taps import head_of
from gradstore.factored import FactoredGradient, Term


@torch.no_grad()
def activations(network: nn.Module, samples: Sequence[Tensor]) -> FactoredGradient:
    """A query's activations as a stored gradient can be multiplied with them.

    The paper scores by "the dot product of activations and tensors" and gives no formula. The
    tensors it stores are gradients of the embedding; the activations that meet that weight, where
    it serves as the head, are the hidden states. So the score of a record with gradient g is

        ⟨g, −Yᵀ H ÷ t⟩ = − mean over the query's predictions s of ⟨H[s], g[y_s]⟩

    with H (t, d) the query's hidden states at the head and Y one-hot in the tokens y that follow:
    how much a step along −g raises the logits of the query's own tokens through the head. That is
    the query's gradient at the head with its softmax left out, and takes a forward pass only.
    Positive: training on the record made the query's tokens likelier.

    ``samples`` are 1-D token ids. Multiply with ``FactoredGradient.dot`` by
    ``record.gradient(model)`` of both sides where the head is tied, by its ``layer="head"``
    where not. Without dropout.
    """
    seen: list[Tensor] = []
    head, was_training = head_of(network), network.training
    device = next(head.parameters()).device
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    network.eval()
    try:
        for tokens in samples:
            network(input_ids=tokens[None].long().to(device))
    finally:
        handle.remove()
        network.train(was_training)
    hidden = torch.cat([each[:-1] for each in seen]).float().cpu()
    following = torch.cat([tokens[1:].long().cpu() for tokens in samples])
    term = Term.one_hot(following, hidden / -len(hidden))
    rows, width = next(head.parameters()).shape
    return FactoredGradient([term], (rows, width))
