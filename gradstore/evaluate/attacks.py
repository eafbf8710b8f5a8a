"""Attacks on forgetting: a little training on what was forgotten, and coarser weights."""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from gradstore.errors import EvaluateError
from gradstore.evaluate.loss import log_likelihoods, sample_losses

Rounding = Literal["bf16", "int8"]
ROUNDINGS: tuple[Rounding, ...] = ("bf16", "int8")


@dataclass(frozen=True)
class RelearnSettings:
    """How to relearn: ``steps`` of AdamW on a ``fraction`` of the forgotten, once for each seed.

    A step takes ``batch_size`` records. The learning rate wants to be one that the model was
    trained with.
    """

    steps: int = 10
    learning_rate: float = 1e-4
    fraction: float = 0.5
    batch_size: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        """Raise :class:`EvaluateError` for what cannot be carried out."""
        if self.steps < 1 or self.batch_size < 1 or not self.seeds:
            raise EvaluateError("relearning takes at least one step, one record and one seed")
        if not 0 < self.fraction < 1 or not self.learning_rate > 0:
            raise EvaluateError(
                f"fraction={self.fraction} and learning_rate={self.learning_rate} mean nothing; "
                "give a fraction between 0 and 1 and a positive learning rate"
            )


@dataclass(frozen=True)
class Split:
    """What is taught again, and the rest: samples with the predictions that count."""

    taught: list[Tensor]
    rest: list[Tensor]
    scored: list[Bool[Tensor, " n"]]


def split(forgotten: Sequence[Tensor], fraction: float, seed: int) -> Split:
    """Some records to teach and the others to look at, at least one of each, as ``seed`` draws.

    Of a single record its beginning is taught, and its end looked at: cut at ``fraction`` times
    something between 1/2 and 3/2 that ``seed`` draws. Raises :class:`EvaluateError` for a single
    record of fewer than four tokens.
    """
    draw = random.Random(seed)
    if len(forgotten) > 1:
        count = min(max(1, round(fraction * len(forgotten))), len(forgotten) - 1)
        chosen = set(draw.sample(range(len(forgotten)), count))
        rest = [tokens for i, tokens in enumerate(forgotten) if i not in chosen]
        everything = [torch.ones(len(tokens) - 1, dtype=torch.bool) for tokens in rest]
        return Split([forgotten[i] for i in sorted(chosen)], rest, everything)
    [tokens] = forgotten
    if len(tokens) < 4:
        raise EvaluateError("a single record needs four tokens: two to teach, two to look at")
    cut = round(fraction * draw.uniform(0.5, 1.5) * len(tokens))
    cut = min(max(2, cut), len(tokens) - 2)
    scored = torch.arange(1, len(tokens)) >= cut
    return Split([tokens[:cut]], [tokens], [scored])


def relearn(
    model: nn.Module, forgotten: Sequence[Tensor], settings: RelearnSettings
) -> list[list[float]]:
    """The loss curve of the rest for each seed: after 0, 1, ... steps; nats per token.

    The model is left as it was. Each step's gradient is that of the mean loss per token of a batch
    without dropout; the curve is the mean over the rest's records.
    """
    return [
        _curve(model, split(forgotten, settings.fraction, s), settings, s) for s in settings.seeds
    ]


def _curve(model: nn.Module, parts: Split, settings: RelearnSettings, seed: int) -> list[float]:
    learner = deepcopy(model).eval()
    weights = [weight.requires_grad_() for weight in learner.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    draw, waiting = random.Random(seed), list[Tensor]()
    curve = [float(sample_losses(learner, parts.rest, parts.scored).mean())]
    for _ in range(settings.steps):
        if not waiting:
            waiting = draw.sample(parts.taught, len(parts.taught))
        batch, waiting = waiting[: settings.batch_size], waiting[settings.batch_size :]
        loss = -log_likelihoods(learner, batch).sum() / sum(len(tokens) - 1 for tokens in batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(sample_losses(learner, parts.rest, parts.scored).mean()))
    return curve


def gain(curve: Sequence[float], reference: Sequence[float]) -> float:
    """How far below its start a curve runs on average, in nats per token.

    Where the reference's curve starts lower, below that: falling from above to where the reference
    already is gives nothing away.
    """
    after = curve[1:]
    return min(curve[0], reference[0]) - sum(after) / len(after)


def rounded(model: Any, rounding: Rounding) -> Any:
    """A copy whose weights have lost what ``bf16`` or ``int8`` cannot hold, as float32 again.

    ``int8``: every tensor of two dimensions or more, row by row (first dimension), symmetric: in
    steps of a row's greatest magnitude / 127; biases and norms stay (as in LLM.int8(), arXiv
    2208.07339, without its outliers). Rounding can undo a small update of the weights (arXiv
    2410.16454).
    """
    copy = deepcopy(model)
    with torch.no_grad():
        for weight in copy.parameters():  # tied ones come once
            if rounding == "bf16":
                weight.copy_(weight.bfloat16())
            elif weight.dim() > 1:
                rows = weight.flatten(1)
                step = rows.abs().amax(1, keepdim=True) / 127
                step[step == 0] = 1.0
                weight.copy_(((rows / step).round() * step).view_as(weight))
    return copy
