"""What the field does, to compare with: optimizer steps on the forgotten and on what stays.

No stored gradient is used. :mod:`gradstore.unlearn.descent` makes a forget request of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from gradstore.capture.taps import embedding_of
from gradstore.errors import ForgetError
from gradstore.evaluate.loss import log_likelihoods, sample_losses
from gradstore.store.store import Store

METHODS = ("ga", "graddiff", "npo")
OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
RETAINED_MEASURED = 64  # evenly spaced among those given


@dataclass(frozen=True)
class BaselineSettings:
    """What is descended, and how.

    ``method``: gradient ascent (``ga``, arXiv 2210.01504), ascent on the forgotten and descent on
    the retained (``graddiff``, arXiv 2203.12817), or negative preference optimization (``npo``,
    arXiv 2404.05868) with the same retained term; ``retained_weight`` 0 leaves that out.

    All terms are per sequence. NPO's published code takes the retained one per token instead: its
    weight 1 is 1 / (tokens a sample) here. NPO's pull fades as it succeeds, so a
    weight that suits GradDiff holds it back: compare over several. The learning rate is TOFU's for
    models of billions of weights (arXiv 2401.06121): small ones need more. A step takes
    ``batch_size`` of the forgotten, and as many of the retained.
    """

    method: Literal["ga", "graddiff", "npo"] = "npo"
    steps: int = 50
    batch_size: int = 4
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-5
    weight_decay: float = 0.01
    beta: float = 0.1
    retained_weight: float = 1.0
    embedding_only: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise :class:`ForgetError` for what cannot be carried out."""
        for name, known in (("method", METHODS), ("optimizer", tuple(OPTIMIZERS))):
            if (given := getattr(self, name)) not in known:
                raise ForgetError(f"{given!r} is no {name}; give one of {', '.join(known)}")
        for name in ("steps", "batch_size", "learning_rate", "beta"):
            if not 0 < (number := getattr(self, name)) < math.inf:
                raise ForgetError(f"{name}={number!r} means nothing; give a positive number")
        if not 0 <= self.retained_weight < math.inf:
            said = f"retained_weight={self.retained_weight!r} means nothing"
            raise ForgetError(f"{said}; give 0 or a positive number")

    @property
    def uses_retained(self) -> bool:
        """Whether there is a retained term."""
        return self.method != "ga" and self.retained_weight != 0


@dataclass(frozen=True)
class Step:
    """Mean losses (nats per token) after so many optimizer steps."""

    step: int
    forget: float
    retained: float | None


@dataclass(frozen=True)
class Steps:
    """Every step that was measured, and the one whose weights were kept.

    ``reached``: the target was met, or, without one, all steps were taken.
    """

    points: list[Step]
    chosen: Step
    reached: bool


def unlearn_by_steps(
    network: nn.Module,
    forget_tokens: Sequence[Tensor],
    retained_tokens: Sequence[Tensor],
    settings: BaselineSettings | None = None,
    *,
    target: float | None = None,
) -> Steps:
    """Change ``network`` in place, all of it or its embedding, until the forgotten are forgotten.

    Tokens are 1-D ids, one tensor a sample. Ends after ``settings.steps``, or where the forgotten's
    mean loss crosses ``target`` (nats per token): of all states up to there, the one nearest to the
    target is kept. A state whose loss is not finite is never kept. Dropout is off: NPO's likelihood
    ratio has to be 1 at the start. The same seed does the same. Raises :class:`ForgetError` for
    nothing to forget, no retained samples where they count, frozen weights, or a broken model.
    """
    settings = settings or BaselineSettings()
    if not forget_tokens:
        raise ForgetError("there is nothing to forget: give the token ids of at least one sample")
    if settings.uses_retained and not retained_tokens:
        raise ForgetError(
            f"{settings.method} descends on retained samples and none were given: take those of "
            "`retained_from(store, run, ids)`, or set retained_weight=0"
        )
    asked = [embedding_of(network).weight] if settings.embedding_only else network.parameters()
    weights = [weight for weight in asked if weight.requires_grad]
    if not weights:
        raise ForgetError("all weights asked for are frozen: call `requires_grad_()` on them first")
    optimizer = OPTIMIZERS[settings.optimizer](
        weights, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    spaced = retained_tokens[:: math.ceil(len(retained_tokens) / RETAINED_MEASURED) or 1]
    draw, was_training = random.Random(settings.seed), network.training
    forgotten = _batches(len(forget_tokens), settings.batch_size, draw)
    retained = _batches(len(retained_tokens), settings.batch_size, draw)
    network.eval()
    try:
        with torch.no_grad():
            reference = torch.cat([log_likelihoods(network, [tokens]) for tokens in forget_tokens])
        points = [_measure(network, 0, forget_tokens, spaced)]
        chosen, kept = points[0], _copies(weights)
        if not math.isfinite(chosen.forget):
            raise ForgetError(
                "the loss of these samples is not a finite number: give a sound model, and samples "
                "of at least two tokens"
            )
        for step in range(1, settings.steps + 1):
            if target is not None and points[-1].forget >= target:
                break
            batch = next(forgotten)
            log_p = log_likelihoods(network, [forget_tokens[i] for i in batch])
            stay = None
            if settings.uses_retained:
                stay = log_likelihoods(network, [retained_tokens[i] for i in next(retained)])
            loss = objective(log_p, reference[batch], stay, settings)
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            optimizer.step()
            point = _measure(network, step, forget_tokens, spaced)
            if not math.isfinite(point.forget):
                break
            points.append(point)
            if target is None or abs(point.forget - target) < abs(chosen.forget - target):
                chosen, kept = point, _copies(weights)
        with torch.no_grad():
            for weight, copy in zip(weights, kept, strict=True):
                weight.copy_(copy)
    finally:
        optimizer.zero_grad()
        network.train(was_training)
    last = points[-1]
    reached = last.step == settings.steps if target is None else last.forget >= target
    return Steps(points, chosen, reached)


def objective(
    log_p: Float[Tensor, " n"],
    reference: Float[Tensor, " n"],
    retained: Float[Tensor, " m"] | None,
    settings: BaselineSettings,
) -> Float[Tensor, ""]:
    """What a step descends, in nats per sequence.

    ``log_p`` are the forgotten's log-likelihoods log π_θ, ``reference`` those before the first
    step, log π_ref; ``retained`` those of what stays. GA's is the mean of log π_θ; NPO's that of
    −(2/β) · log σ(−β · log(π_θ/π_ref)) (arXiv 2404.05868), which becomes GA's, but for a
    constant, as β → 0. GradDiff and NPO add ``retained_weight`` · mean of −log π_θ of the retained.
    """
    if settings.method == "npo":
        forget = -2 / settings.beta * logsigmoid(-settings.beta * (log_p - reference))
    else:
        forget = log_p
    if retained is None or not settings.uses_retained:
        return forget.mean()
    return forget.mean() - settings.retained_weight * retained.mean()


def retained_from(
    store: Store, run: dict[str, Any], forget: Sequence[str], at_most: int = 1000, seed: int = 0
) -> list[Tensor]:
    """Token ids (1-D) of samples a run was trained on, without those to forget.

    All of them, or ``at_most`` that ``seed`` draws, in the order of the store. Raises
    :class:`IdError` for an id that names no sample.
    """
    gone = set(store.resolve(forget).values())
    trained_on = store.rows(
        "SELECT DISTINCT sample_id FROM exposures WHERE run_id = ? ORDER BY sample_id",
        [run["run_id"]],
    )
    stay = [number for (number,) in trained_on if number not in gone]
    if len(stay) > at_most:
        stay = sorted(random.Random(seed).sample(stay, at_most))
    tokens = store.tokens(stay, run["run_id"])
    return [tokens[number] for number in stay]


def _batches(count: int, size: int, draw: random.Random) -> Iterator[list[int]]:
    """Batches of one shuffled round after the other; the last of a round may be smaller."""
    while True:
        order = draw.sample(range(count), count)
        yield from (order[start : start + size] for start in range(0, count, size))


def _measure(
    network: nn.Module, step: int, forget: Sequence[Tensor], retained: Sequence[Tensor]
) -> Step:
    forgotten = float(sample_losses(network, forget).mean())
    return Step(
        step, forgotten, float(sample_losses(network, retained).mean()) if retained else None
    )


def _copies(weights: Sequence[Tensor]) -> list[Tensor]:
    return [weight.detach().clone() for weight in weights]
