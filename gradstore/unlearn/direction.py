"""Which way to move the weights so that samples are forgotten."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradstore.errors import ForgetError, SettingsError
from gradstore.influence.curvature import GaussNewton, conjugate_gradients
from gradstore.influence.predictions import flat, parts
from gradstore.influence.scale import root_of_second_moment
from gradstore.influence.woodbury import woodbury
from gradstore.store.store import Store
from gradstore.unlearn import controls
from gradstore.unlearn.exposures import (
    Met,
    epochs_of,
    held_after,
    layers_of,
    recomputed,
    records,
    stored,
    weights_of,
)
from gradstore.unlearn.further import further
from gradstore.unlearn.held import NOBODY, Held
from gradstore.unlearn.unused import Tokens, as_if_unused, tokens_of

DIRECTIONS = ("applied", "newton", "orthogonal", "raw", "fresh", "random")
HELD = {"newton": 64, "orthogonal": 64}  # by so many samples that stay
HELD_INSIDE = 128  # for ``newton`` of more than the embedding: more directions are to be held
OUTER = ("embedding", "position", "head")  # layers that touch tokens or places
WEIGHTS = ("washed", "rising", "uniform")
Kind = Literal["applied", "newton", "orthogonal", "raw", "fresh", "random"]

PULL = 4.0  # times its own curvature: an entry is also held by those it is coupled to
PULL_INSIDE = 2048.0  # for layers between embedding and head, where every token meets every entry
HOLD = 0.5  # times the curvature of what stays, in ``newton``: measured, see docs/forgetting.md
FURTHER = 1.3  # times the loss's way, by ``newton`` of more than the embedding: it falls short
HALF = 0.5  # the dose that suits steps whose washing-out is not reckoned
ITERATIONS = 16  # of conjugate gradients, at most
_TOLERANCE = 0.01
_STIFF = 128.0  # what PULL_INSIDE is where only the speed of the solution depends on it
_ROWS = 512  # of a matrix, worked on together: what is made in between stays in the cache


@dataclass(frozen=True)
class Direction:
    """``updates`` (V, d): adding α times them to the weights they name raises the samples' loss.

    A weight is ``embedding``, or another that :meth:`Record.gradients` names.
    ``dose`` is the α it is made for, None if its length means nothing; ``weights`` what exposures
    were weighted by, None where there is one of each sample; ``alone`` counts the tokens that only
    the samples contain, whose rows go where they would be had nobody used them.
    """

    kind: Kind
    updates: Mapping[str, Float[Tensor, "V d"]]
    dose: float | None
    exposures: int
    weights: str | None = None
    alone: int = 0

    @property
    def update(self) -> Float[Tensor, "V d"]:
        """That of the embedding."""
        return self.updates["embedding"]


def find(
    kind: str,
    store: Store,
    run: dict[str, Any],
    sample_ids: Sequence[int],
    network: nn.Module,
    *,
    held: Held = NOBODY,
    weights: str | None,
    seed: int,
    checkpoints: Sequence[Path] = (),
    layers: Sequence[str] = ("embedding",),
    epochs: str | None = None,
    tokens: Callable[[], Tokens] | None = None,
) -> Direction:
    """The direction of a kind; ``held`` are samples that stay, for those in ``HELD``.

    ``checkpoints`` complete what was not captured, for ``applied`` and those in ``HELD``.
    ``layers`` are those whose weights move, as :func:`layers_of` reads them, and ``epochs`` the
    stored ones that count (as in :class:`Schedule`; None: the first for ``raw``, else all), but for
    ``fresh`` and ``random``. Where steps of all epochs are undone at dose 1, tokens that nobody
    else uses are treated by :func:`as_if_unused`; ``tokens`` gives them, None: :func:`tokens_of`.

    Raises :class:`ForgetError` for an unknown kind, or what cannot be had from the store, and
    :class:`SettingsError` for layers or epochs that the kind does not have.
    """
    names = layers_of(store, run, layers)
    if names != ["embedding"] and kind not in (several := ("applied", "newton", "raw", "fresh")):
        raise SettingsError(
            f"--direction {kind} moves the embedding only: with --layers give --direction "
            f"{' or '.join(several)}"
        )
    if epochs is not None and kind in ("fresh", "random"):
        raise SettingsError(f"--epochs belongs to directions of stored gradients, not {kind}")
    if kind in HELD and not held.everyone:
        raise ForgetError("nothing stays that could hold the model: give --direction applied")
    if kind in ("applied", *HELD):
        every = epochs or "all"
        if kind == "applied":
            undone = applied(store, run, sample_ids, weights, checkpoints, names, every)
        elif kind == "newton":
            undone = newton(store, run, sample_ids, network, held, checkpoints, names, every)
        else:
            undone = orthogonal(store, run, sample_ids, held.everyone, weights, checkpoints, every)
        if epochs is not None or undone.dose != 1.0:
            return undone
        found = tokens() if tokens else tokens_of(store, run, sample_ids)
        updates, alone = as_if_unused(store, run, network, undone.updates, found)
        return replace(undone, updates=updates, alone=alone)
    if kind not in DIRECTIONS:
        raise ForgetError(f"{kind!r} is no direction; give one of {', '.join(DIRECTIONS)}")
    first = raw(
        store, run, sample_ids, names, epochs or "first"
    )  # refuses what the run was not trained on
    if kind == "raw":
        return first
    texts = list(store.tokens(list(sample_ids), run["run_id"]).values())
    if kind == "fresh":
        updates = controls.gradients(network, texts, weights_of(store, run, names))
        return replace(first, kind="fresh", updates=updates)
    noise = controls.random(first.update, texts, seed)
    return replace(first, kind="random", updates={"embedding": noise})


def raw(
    store: Store,
    run: dict[str, Any],
    sample_ids: Sequence[int],
    layers: Sequence[str] = ("embedding",),
    epochs: str = "first",
) -> Direction:
    """The sum of the samples' first stored gradients: ascent as in arXiv 2406.09391.

    The gradient is of each sample's summed loss; the step's length means nothing, so it needs a
    target. Both sides of a tied embedding, where they are stored. ``epochs`` sums others than the
    first stored one.
    """
    updates: dict[str, Tensor] = {}
    met = records(store, run, sample_ids, epochs)
    for record in met:
        for name, gradient in record.gradients(store.model, layers).items():
            gradient.add_to(updates.setdefault(name, torch.zeros(gradient.shape)))
    return Direction("raw", updates, None, len(met))


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
    roots = {"embedding": _root_of_second_moment(store, run)}
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
        after = _after(met, run) / met.share if weights == "washed" else 0.0
        for name, gradient in met.gradients.items():
            if name not in updates:
                updates[name] = torch.zeros(gradient.shape)
                steps[name] = torch.empty(gradient.shape)
            if name not in roots:
                roots[name] = _root_of_second_moment(store, run, name)
            root, epsilon = roots[name]
            pull = _pull(name) * after
            step = gradient.add_to(steps[name].zero_(), met.share)
            if root is not None:
                root = root.view(step.shape)
                for rows, of_rows in zip(step.split(_ROWS), root.split(_ROWS), strict=True):
                    divisor = _at_least(of_rows, rows, run)
                    rows /= (divisor + epsilon).mul_((divisor * pull).add_(1))
            updates[name].add_(step, alpha=weight * met.learning_rate)
        count += 1
    return Direction("applied", updates, 1.0 if weights == "washed" else HALF, count, weights)


def newton(
    store: Store,
    run: dict[str, Any],
    sample_ids: Sequence[int],
    network: nn.Module,
    held: Held,
    checkpoints: Sequence[Path] = (),
    layers: Sequence[str] = ("embedding",),
    epochs: str = "all",
) -> Direction:
    """The samples' steps as far as what stays lets go of them: (M + c·G)⁻¹ Σ w · η · s · g.

    M = √v̂ is the optimizer's own scale (1 for SGD), w rises with the epoch, G the Gauss-Newton
    matrix of what stays at ``network``, of all ``layers`` together, estimated from the strata of
    ``held``. After an exposure, training on what stays goes on along −M⁻¹G; this is where it leads
    in one implicit Euler step of length c = how firmly the steps that came after held the model
    (:func:`held_after`; its mean, weighted by w · η). For the embedding alone
    c = HOLD · the learning rates that came after · what a step's loss was in units of a mean over
    tokens. Directions that the others hold firmly, such as the template that records
    share, are left alone; what only the forgotten taught is undone. Solved by conjugate gradients,
    preconditioned by what ``washed`` takes for the matrix's diagonal.
    Where more than the embedding moves, the solution is stretched until the samples' loss has gone
    FURTHER times as far (:func:`further`), to where that of a model retrained is.
    Raises :class:`ForgetError` as ``applied`` does.
    """
    steps: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    epsilons: dict[str, float] = {}
    adam = run["optimizer"] != "SGD"
    taught, shares = list[tuple[float, float, Sequence[int]]](), list[float]()
    squares = defaultdict[int, list[float]](list)
    for met, weight in _weighted(store, run, sample_ids, "rising", checkpoints, layers, epochs):
        square = 0.0
        for name, gradient in met.gradients.items():
            step = gradient.add_to(torch.zeros(gradient.shape), met.share)
            if name not in steps:
                root, epsilons[name] = _root_of_second_moment(store, run, name)
                steps[name] = torch.zeros_like(step)
                scales[name] = torch.ones_like(step) if root is None else root.view(step.shape)
            if adam:
                scales[name] = _at_least(scales[name], step.clone(), run)
            steps[name].add_(step, alpha=weight * met.learning_rate)
            square += float(step.square().sum())
        taught.append((weight * met.learning_rate, _after(met, run), met.steps))
        shares.append(met.share)
        squares[met.epoch].append(square / met.share**2 if met.share else 0.0)
    total = sum(rate for rate, _, _ in taught) or 1.0
    after = sum(rate * later for rate, later, _ in taught) / total
    plain = [*steps] == ["embedding"]
    if plain:
        [(in_tokens,)] = store.rows(
            """SELECT median(of_step) FROM (
                   SELECT sum(batch_share * grad_scale * scored_tokens) AS of_step
                   FROM exposures WHERE run_id = ? GROUP BY step)""",
            [run["run_id"]],
        )
        c = HOLD * after * in_tokens
    else:
        own = {epoch: fmean(of) for epoch, of in squares.items()} if checkpoints else None
        held_for = held_after(store, run, own)
        c = sum(rate * fmean(held_for[s] for s in of) for rate, _, of in taught) / total
    device = next(network.parameters()).device
    scale = flat({name: scales[name] + epsilons[name] for name in steps}).to(device)
    per_share = after / fmean(shares) if adam and any(shares) else 0.0
    pulls = {name: torch.full_like(of, min(_STIFF, _pull(name))) for name, of in scales.items()}
    diagonal = scale * (1 + per_share * flat(pulls).to(device) * scale)
    curvatures = [
        (part, GaussNewton(network, list(store.tokens(list(of), run["run_id"]).values()), steps))
        for part, of in held.strata
    ]
    solved = conjugate_gradients(
        lambda v: scale * v + c * sum(part * curvature(v) for part, curvature in curvatures),
        flat(steps).to(device),
        diagonal,
        iterations=ITERATIONS,
        tolerance=_TOLERANCE,
    )
    updates = parts(solved.x.cpu(), steps)
    if not plain:
        texts = list(store.tokens(list(sample_ids), run["run_id"]).values())
        multiple = further(network, updates, texts, FURTHER)
        updates = {name: update * multiple for name, update in updates.items()}
    return Direction("newton", updates, 1.0, len(taught), "rising")


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
    root, epsilon = _root_of_second_moment(store, run)
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
    layers: Sequence[str] = ("embedding",),
    epochs: str = "all",
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
    met = stored(store, run, sample_ids, layers, epochs)
    if checkpoints:  # every epoch is there
        every = [epoch for epoch, *_ in epochs_of(store, run)]
        mean = dict.fromkeys(mean, sum(every) / len(every))
        met = chain(met, recomputed(store, run, sample_ids, checkpoints, layers))
    for each in met:
        yield each, each.epoch / mean[each.id] if mean else 1.0


def _pull(weight: str) -> float:
    return PULL if weight in OUTER else PULL_INSIDE


def _at_least(root: Tensor, step: Tensor, run: dict[str, Any]) -> Tensor:
    """√v̂, but no less than what an exposure that moved the weights by ``step`` had put there.

    v̂ is known at the end of the run: where a rare token's last gradient lies far back it has
    faded, and dividing by what is left would undo more than Adam ever did.
    """
    own = step.abs().mul_((1 - (run["beta2"] or 0.0)) ** 0.5)
    return torch.maximum(root, own, out=own)


def _after(met: Met, run: dict[str, Any]) -> float:
    if met.after is None:
        raise ForgetError(
            f"{run['name']} kept no list of its steps, so how much training came after a record is "
            "not known; give --direction applied --weights rising"
        )
    return met.after


def _root_of_second_moment(
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
