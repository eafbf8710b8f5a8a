"""Attacks on forgetting: a little training on what was forgotten, and coarser weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from gradstore.errors import EvaluateError
from gradstore.evaluate.loss import log_likelihoods, sample_losses

Rounding = Literal["bf16", "int8"]
ROUNDINGS: tuple[Rounding, ...] = ("bf16", "int8")


HOLDOUT: Literal["holdout"] = "holdout"
GENTLE = 1 / 40  # of the rate that a run peaked at
On = float | Literal["holdout"]


@dataclass(frozen=True)
class RelearnSettings:
    """How to relearn: ``steps`` of AdamW (no weight decay), once for each seed.

    ``on`` says what is taught: a share of the forgotten, at least one record, while the loss of the
    others is watched; or ``"holdout"``, held-out records, while all of the forgotten are watched. A
    step takes ``batch_size`` records.

    AdamW starts cold here: its first steps move every weight by the whole ``learning_rate``,
    however small the gradient. At the rates of a run's beginning that shakes loose more of what a
    model knows than it teaches. :data:`GENTLE` times the peak, which a linear schedule has on
    average in its last twentieth, does not: of the original, the forgotten's loss as a whole falls.
    """

    steps: int = 10
    learning_rate: float = 1e-4
    on: On = 0.5
    batch_size: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        """Raise :class:`EvaluateError` for what cannot be carried out."""
        if self.steps < 1 or self.batch_size < 1 or not self.seeds:
            raise EvaluateError("relearning takes at least one step, one record and one seed")
        if not self.learning_rate > 0:
            raise EvaluateError(f"learning_rate={self.learning_rate} is not positive")
        if self.on != HOLDOUT and not 0 < self.on < 1:
            raise EvaluateError(
                f"relearning on {self.on} means nothing; give a share of the forgotten between 0 "
                'and 1, or "holdout"'
            )


def share_of(text: str) -> On:
    """``on`` of a text like ``10%`` or ``holdout``. Raises :class:`ValueError`."""
    if text == HOLDOUT:
        return HOLDOUT
    number = text.removesuffix("%")
    if number != text and number.replace(".", "", 1).isdecimal() and 0 < float(number) < 100:
        return float(number) / 100
    raise ValueError(f"{text!r} is neither a percentage between 0% and 100%, like 10%, nor holdout")


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


@dataclass(frozen=True)
class Relearned:
    """Mean losses over records, nats per token: of the rest after 0, 1, ... steps (the curve), and
    of what was taught before the first and after the last."""

    rest: list[float]
    taught: tuple[float, float]


def relearn_each(
    models: Mapping[str, nn.Module],
    forgotten: Sequence[Tensor],
    held_out: Sequence[Tensor],
    settings: RelearnSettings,
    progress: Callable[[str], None],
) -> dict[str, list[Relearned]]:
    """What :func:`relearn` finds, of each model by its name."""
    found = {}
    for name, model in models.items():
        progress(f"relearning, from the {name}")
        found[name] = relearn(model, forgotten, settings, held_out)
    return found


def relearn(
    model: nn.Module,
    forgotten: Sequence[Tensor],
    settings: RelearnSettings,
    held_out: Sequence[Tensor] = (),
) -> list[Relearned]:
    """What teaching does to the rest's loss, for each seed.

    The model is left as it was. Each step's gradient is that of the mean loss per token of a batch
    without dropout. ``held_out`` is what ``settings.on`` "holdout" teaches; without any of it
    :class:`EvaluateError` is raised.
    """
    if settings.on == HOLDOUT:
        if not held_out:
            raise EvaluateError("no held-out records to relearn on: give a share of the forgotten")
        everything = [torch.ones(len(tokens) - 1, dtype=torch.bool) for tokens in forgotten]
        parts = [Split(list(held_out), list(forgotten), everything)] * len(settings.seeds)
    else:
        parts = [split(forgotten, settings.on, seed) for seed in settings.seeds]
    pairs = zip(parts, settings.seeds, strict=True)
    return [_relearned(model, part, settings, seed) for part, seed in pairs]


def _relearned(model: nn.Module, parts: Split, settings: RelearnSettings, seed: int) -> Relearned:
    learner = deepcopy(model).eval()
    weights = [weight.requires_grad_() for weight in learner.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    draw, waiting = random.Random(seed), list[Tensor]()
    curve = [float(sample_losses(learner, parts.rest, parts.scored).mean())]
    before = float(sample_losses(learner, parts.taught).mean())
    for _ in range(settings.steps):
        if not waiting:
            waiting = draw.sample(parts.taught, len(parts.taught))
        batch, waiting = waiting[: settings.batch_size], waiting[settings.batch_size :]
        loss = -log_likelihoods(learner, batch).sum() / sum(len(tokens) - 1 for tokens in batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(sample_losses(learner, parts.rest, parts.scored).mean()))
    return Relearned(curve, (before, float(sample_losses(learner, parts.taught).mean())))


def said(found: Mapping[str, Sequence[Relearned]], settings: RelearnSettings) -> list[str]:
    """What was taught, and by how much its loss fell, of each model by its name.

    Also where teaching did harm instead: where the rest's loss rose by more than that of the taught
    fell, in the original if it is there. That model has nothing to relearn, but neither should it
    forget.
    """
    on = (
        "held-out records"
        if settings.on == HOLDOUT
        else f"{100 * settings.on:.3g} % of the forgotten"
    )
    falls = (
        f"{name} {fmean(each.taught[0] for each in of):.3f} to "
        f"{fmean(each.taught[1] for each in of):.3f}"
        for name, of in found.items()
    )
    lines = [
        f"Relearning on {on}, {settings.steps} steps at a rate of {settings.learning_rate:.3g}: "
        f"the loss of what is taught went from {', '.join(falls)}."
    ]
    name = "original" if "original" in found else next(iter(found))
    rise = fmean(each.rest[-1] - each.rest[0] for each in found[name])
    fall = fmean(each.taught[0] - each.taught[1] for each in found[name])
    if not rise <= fall:  # nor where training diverged
        lines.append(
            f"It shook the {name} more than it taught (the rest {rise:+.3f}, the taught "
            f"{-fall:+.3f}), so relearning says little: give a lower --relearn-lr."
        )
    return lines


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
