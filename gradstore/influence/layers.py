"""Products of stored gradients of linear layers with a query's, from their factors.

A layer's gradient is AᵀB as its weight lies, inputs and gradients at its outputs by turns, so its
product with a matrix X is Σ_t (X a_t) · b_t; a bias has 1ᵀB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradstore.capture.layers import parameter
from gradstore.errors import InfluenceError
from gradstore.influence.rows import Place
from gradstore.store.record import LinearLayer
from gradstore.store.segment import SegmentReader, Source

Weights = Mapping[str, Tensor]  # by their names: <layer>.weight as it lies, <layer>.bias


def layers_segment(
    source: Source, places: Sequence[Place], layers: Sequence[LinearLayer], query: Weights
) -> Float[Tensor, " places"]:
    """⟨gradient, query⟩ over some linear layers' weights, for records of one segment; float64.

    A pure function of what it is given, as :func:`gradstore.influence.scan.score_segment` is, which
    multiplies where the query lies. It holds the factors of one layer of one record.
    """
    segment, scores = SegmentReader.at(source), torch.zeros(len(places), dtype=torch.float64)
    for layer in layers:
        weight, bias = query[f"{layer.layer}.weight"], query.get(f"{layer.layer}.bias")
        inward = weight if layer.input_first else weight.T
        for number, place in enumerate(places):
            rows = place.row_start, place.row_start + place.rows
            stored = (segment.tensor(f"{layer.layer}.{of}", *rows) for of in "AB")
            A, B = (factor.to(weight.device).float() for factor in stored)  # noqa: N806
            scores[number] += float(((A @ inward) * B).sum(dtype=torch.float64))
            if bias is not None:
                scores[number] += float((B @ bias.flatten()).sum(dtype=torch.float64))
    return scores


def weights_of(layers: Sequence[LinearLayer]) -> list[str]:
    """Names of the layers' weights and biases."""
    parts = (("weight", "bias") if layer.bias else ("weight",) for layer in layers)
    return [
        f"{layer.layer}.{part}" for layer, own in zip(layers, parts, strict=True) for part in own
    ]


def gradients_of(
    network: nn.Module, tokens: Int[Tensor, " t"], first: int, layers: Sequence[LinearLayer]
) -> dict[str, Tensor]:
    """∂/∂weights of the summed cross-entropy of ``tokens[first:]``, in the weights' shapes.

    Without dropout. Raises :class:`InfluenceError` for a frozen weight.
    """
    weights = {name: parameter(network, name) for name in weights_of(layers)}
    if frozen := [name for name, weight in weights.items() if not weight.requires_grad]:
        raise InfluenceError(f"{frozen[0]} is frozen, so it has no gradient; leave its layer out")
    was_training = network.training
    network.eval()
    try:
        batch = tokens.long()[None].to(next(iter(weights.values())).device)
        logits = network(input_ids=batch).logits[0, first - 1 : -1]
        loss = cross_entropy(logits.float(), batch[0, first:], reduction="sum")
        found = torch.autograd.grad(loss, list(weights.values()))
    finally:
        network.train(was_training)
    return {name: gradient.cpu() for name, gradient in zip(weights, found, strict=True)}
