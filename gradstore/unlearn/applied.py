"""What the optimizer did with samples' gradients, and what is left of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradstore.errors import ForgetError
from gradstore.influence.scale import root_of_second_moment
from gradstore.influence.woodbury import woodbury
from gradstore.store.store import Store
from gradstore.unlearn.direction import Direction
from gradstore.unlearn.exposures import Met, epochs_of, met_by

OUTER = ("embedding", "position", "head")  # layers that touch tokens or places
WEIGHTS = ("washed", "rising", "uniform")

PULL = 4.0  # times its own curvature: an entry is also held by those it is coupled to
PULL_INSIDE = 2048.0  # for layers between embedding and head, where every token meets every entry
HALF = 0.5  # the dose that suits steps whose washing-out is not reckoned
_ROWS = 512  # of a matrix, worked on together: what is made in between stays in the cache


def applied(
    store: Store,
    run: dict[str, Any],
    sample_ids: Sequence[int],
    weights: str | None = None,
    checkpoints: Sequence[Path] = (),
    layers: Sequence[str] = ("embedding",),
    epochs: str = "all",
) -> Direction:
    """What the samples made the optimizer do, with its sign turned: Σ w · η · s · g / √v̂.

    The sum is over the stored exposures of ``epochs``, and those recomputed at ``checkpoints``; η
    is the learning rate at each, s what the sample's summed loss counted in the step, after
    clipping; v̂ Adam's bias-corrected second moment at the end of the run (√v̂ = 1 for SGD). The
    weights w (V, d) say what is left of a step:

    ``washed``  1 / (1 + PULL · A · √v̂ / s), with A the sum of the learning rates that came after.
                Later steps pull an entry back at the rate η · F / √v̂ with F its curvature, and v̂
                tells it: a step's gradient is noise of variance s · F, so F = v̂ / s. Inner layers
                have PULL_INSIDE: next to nothing is left of an early step there.
    ``rising``  epoch ÷ mean epoch, a rule of thumb for the same.
    ``uniform`` 1: as if nothing were washed out.

    None is ``washed`` for Adam and ``rising`` for SGD. Raises :class:`ForgetError` for another
    optimizer, and for a run of whose steps nothing is known.
    """
    roots = {"embedding": root_of(store, run)}
    adam = roots["embedding"][0] is not None
    weights = weights or ("washed" if adam else "rising")
    if weights not in WEIGHTS:
        raise ForgetError(f"{weights!r} are no weights; give one of {', '.join(WEIGHTS)}")
    if weights == "washed" and not adam:
        raise ForgetError("SGD keeps no second moments to tell what was washed out by: give rising")
    updates: dict[str, Tensor] = {}
    steps: dict[str, Tensor] = {}
    count = 0
    for met, weight in _weighted(store, run, sample_ids, weights, checkpoints, layers, epochs):
        after = rates_after(met, run) / met.share if weights == "washed" else 0.0
        for name, gradient in met.gradients.items():
            if name not in updates:
                updates[name] = torch.zeros(gradient.shape)
                steps[name] = torch.empty(gradient.shape)
            if name not in roots:
                roots[name] = root_of(store, run, name)
            root, epsilon = roots[name]
            pull = pull_of(name) * after
            step = gradient.add_to(steps[name].zero_(), met.share)
            if root is not None:
                root = root.view(step.shape)
                for rows, of_rows in zip(step.split(_ROWS), root.split(_ROWS), strict=True):
                    divisor = at_least(of_rows, rows, run)
                    rows /= (divisor + epsilon).mul_((divisor * pull).add_(1))
            updates[name].add_(step, alpha=weight * met.learning_rate)
        count += 1
    return Direction("applied", updates, 1.0 if weights == "washed" else HALF, count, weights)


def orthogonal(
    store: Store,
    run: dict[str, Any],
    sample_ids: Sequence[int],
    retained: Sequence[int],
    weights: str | None = None,
    checkpoints: Sequence[Path] = (),
    epochs: str = "all",
) -> Direction:
    """``applied`` less its part along the last stored gradients of some ``retained`` samples.

    What is left is orthogonal to each of them, so that to first order none of their losses moves,
    and nearest to ``applied`` in the optimizer's metric √v̂. Needs no model: the limit of a Newton
    step in the empirical Fisher matrix, for which any useful strength is as good as infinite.
    Raises :class:`ForgetError` as ``applied`` does.
    """
    start = applied(store, run, sample_ids, weights, checkpoints, epochs=epochs)
    root, epsilon = root_of(store, run)
    metric = 1.0 if root is None else root + epsilon
    last = {
        record.exposure.id: record.gradient(store.model)
        for record in store.records(list(retained), run["run_id"])
    }
    update = woodbury(list(last.values()), start.update * metric, metric, math.inf)
    return replace(start, kind="orthogonal", updates={"embedding": update})


def _weighted(
    store: Store,
    run: dict[str, Any],
    sample_ids: Sequence[int],
    weights: str,
    checkpoints: Sequence[Path],
    layers: Sequence[str],
    epochs: str,
) -> Iterator[tuple[Met, float]]:
    """Every exposure with its scalar weight: 1, or its epoch over the sample's mean epoch."""
    mean: dict[str, float] = {}
    if weights == "rising":
        mean = dict(
            store.rows(
                """SELECT id, avg(epoch) FROM gradients
                   WHERE run_id = ? AND list_contains(?, sample_id) GROUP BY id""",
                [run["run_id"], list(sample_ids)],
            )
        )
    if checkpoints:  # every epoch is there
        every = [epoch for epoch, *_ in epochs_of(store, run)]
        mean = dict.fromkeys(mean, sum(every) / len(every))
    for met in met_by(store, run, sample_ids, checkpoints, layers, epochs):
        yield met, met.epoch / mean[met.id] if mean else 1.0


def pull_of(weight: str) -> float:
    """PULL, or PULL_INSIDE, for a weight by its name."""
    return PULL if weight in OUTER else PULL_INSIDE


def at_least(root: Tensor, step: Tensor, run: dict[str, Any]) -> Tensor:
    """√v̂, but no less than what an exposure that moved the weights by ``step`` had put there.

    v̂ is known at the end of the run: where a rare token's last gradient lies far back it has
    faded, and dividing by what is left would undo more than Adam ever did.
    """
    own = step.abs().mul_((1 - (run["beta2"] or 0.0)) ** 0.5)
    return torch.maximum(root, own, out=own)


def rates_after(met: Met, run: dict[str, Any]) -> float:
    """``after`` of an exposure; raises :class:`ForgetError` where the run kept no steps."""
    if met.after is None:
        raise ForgetError(
            f"{run['name']} kept no list of its steps, so how much training came after a record is "
            "not known; give --direction applied --weights rising"
        )
    return met.after


def root_of(
    store: Store, run: dict[str, Any], weight: str = "embedding"
) -> tuple[Tensor | None, float]:
    """√v̂ of a weight at the end of the run (None for SGD), and ε."""
    known = root_of_second_moment(store, run, weight)
    if known is None:
        if run["optimizer"] == "SGD":
            return None, 0.0
        raise ForgetError(
            f"{run['name']} kept no second moments of {run['optimizer']} at its end, so what it "
            "applied is not known (an unfinished run, or an optimizer that is neither Adam nor "
            "SGD); use --direction raw"
        )
    return known
