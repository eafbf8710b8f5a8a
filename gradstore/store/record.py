"""One sample's gradient at one exposure, as it is captured, stored and read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gradstore.factored import FactoredGradient, Term
from gradstore.store.format import ModelIdentity

Sides = Literal["input", "both"]


@dataclass(frozen=True)
class Exposure:
    """When and how a run met a sample; the columns of the catalog's table ``exposures``."""

    id: str
    epoch: int
    step: int
    learning_rate: float
    batch_share: float
    grad_scale: float
    loss: float | None
    scored_tokens: int
    d_norm: float
    h_norm: float | None
    mass_kept: float | None
    relative_error: float | None
    position_start: int | None


@dataclass(frozen=True)
class OutputSide:
    """The head's side of the gradient at t positions: hidden states and a compact R.

    R = softmax − one-hot has its ``k`` largest entries in ``index`` and ``value``, the label's
    entry (the only negative one) in ``label``, and the rest, ``tail_mass`` a position, spread as
    ``tail`` says: one distribution over the vocabulary, shared by the micro-batch.
    """

    H: Float[Tensor, "t d"]
    index: Int[Tensor, "t k"]
    value: Float[Tensor, "t k"]
    label: Float[Tensor, " t"]
    tail_mass: Float[Tensor, " t"]
    tail: Float[Tensor, " V"]

    def squares(self) -> Float[Tensor, " t"]:
        """|R|²|H|² of each position, entries kept."""
        entries = self.value.float().square().sum(1) + self.label.float().square()
        return entries * self.H.float().square().sum(1)

    def terms(self, labels: Int[Tensor, " t"]) -> list[Term]:
        """The head's gradient: sparse entries, and the rank-one tail."""
        index = torch.cat([labels[:, None].long(), self.index.long()], dim=1)
        value = torch.cat([self.label[:, None].float(), self.value.float()], dim=1)
        hidden = self.H.float()
        return [
            Term(index, value, hidden),
            Term(None, self.tail[None], self.tail_mass.float()[None] @ hidden),
        ]


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer that a run captures; the columns of the catalog's table ``layers``.

    ``input_first``: its weight is (in, out), as that of transformers' ``Conv1D``, not (out, in).
    """

    layer: str
    width_in: int
    width_out: int
    input_first: bool
    bias: bool


@dataclass(frozen=True)
class Factors:
    """A linear layer at t positions: inputs A, and the summed loss's gradient B at its outputs."""

    layer: LinearLayer
    A: Float[Tensor, "t in"]
    B: Float[Tensor, "t out"]

    def weight(self) -> FactoredGradient:
        """The weight's gradient, as the weight lies: AᵀB where it is (in, out), else BᵀA."""
        first, second = (self.A, self.B) if self.layer.input_first else (self.B, self.A)
        return FactoredGradient([Term(None, first, second)], (first.shape[1], second.shape[1]))

    def bias(self) -> FactoredGradient:
        """The bias's gradient 1ᵀB, as a matrix of one row."""
        ones = torch.ones(len(self.B), 1, device=self.B.device)
        return FactoredGradient([Term(None, ones, self.B)], (1, self.B.shape[1]))


@dataclass(frozen=True)
class Record:
    """The factors of one sample's gradient.

    ``tokens`` (t+1,) are its ids without padding, ``scored`` (t,) whether the loss counts the
    prediction made at each position, ``D`` (t, d) the gradient of the summed loss at the
    embedding's output. The last position predicts nothing, so D, H and R have one row less, and so
    have the factors of ``layers``, by the names of linear layers that were captured as well.
    """

    exposure: Exposure
    tokens: Int[Tensor, " t+1"]
    scored: Bool[Tensor, " t"]
    D: Float[Tensor, "t d"]
    output: OutputSide | None
    layers: Mapping[str, Factors] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors in memory, the shared tail not counted."""
        held: list[Any] = [self.tokens, self.scored, self.D]
        if self.output is not None:
            held += [self.output.H, self.output.index, self.output.value]
        for factors in self.layers.values():
            held += [factors.A, factors.B]
        return sum(tensor.nbytes for tensor in held)

    def gradient(
        self, model: ModelIdentity, layer: str = "embedding", sides: Sides | None = None
    ) -> FactoredGradient:
        """The gradient of one weight.

        ``embedding`` is the token embedding: with a tied head and both sides stored, the sum of
        input and output side, or the input side alone with ``sides="input"``. ``position`` is a
        learned position embedding, ``head`` an untied output matrix; any other name is that of a
        captured linear layer, whose weight's gradient comes as the weight lies. Raises
        ``ValueError`` for what the record does not hold.
        """
        inputs = self.tokens[:-1]
        if layer not in ("embedding", "position", "head"):
            if layer not in self.layers:
                held = ", ".join(["embedding", *self.layers])
                raise ValueError(f"no layer {layer!r} was captured; this record holds {held}")
            return self.layers[layer].weight()
        if layer == "position":
            if self.exposure.position_start is None or model.positions is None:
                raise ValueError("this model has no learned position embedding")
            places = self.exposure.position_start + torch.arange(len(self.D))
            return FactoredGradient(
                [Term.one_hot(places, self.D)], (model.positions, self.D.shape[1])
            )
        if layer == "head":
            if model.tied or self.output is None:
                raise ValueError(
                    "the head is tied to the embedding: ask for layer='embedding'"
                    if model.tied
                    else "the output side was not stored: capture with sides='both'"
                )
            terms = self.output.terms(self.tokens[1:])
            return FactoredGradient(terms, (model.vocabulary, model.head_width))
        terms = [Term.one_hot(inputs, self.D)]
        if model.tied and self.output is not None and sides != "input":
            terms += self.output.terms(self.tokens[1:])
        elif sides == "both":
            raise ValueError("both sides of the embedding exist only where the head is tied to it")
        return FactoredGradient(terms, (model.vocabulary, model.width))

    def gradients(
        self, model: ModelIdentity, layers: Sequence[str] = ("embedding",)
    ) -> dict[str, FactoredGradient]:
        """The gradients of all weights of some layers, by parameter.

        ``embedding``, ``position`` and ``head`` are named like this; a linear layer has
        ``<layer>.weight`` and, as a matrix of one row, ``<layer>.bias``.
        """
        found = {}
        for layer in layers:
            if layer in ("embedding", "position", "head"):
                found[layer] = self.gradient(model, layer)
                continue
            found[f"{layer}.weight"] = self.gradient(model, layer)
            if (factors := self.layers[layer]).layer.bias:
                found[f"{layer}.bias"] = factors.bias()
        return found
