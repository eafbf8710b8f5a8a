"""The optimizer's steps undone as far as what stays lets go of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from gradstore.influence.curvature import GaussNewton, conjugate_gradients
from gradstore.influence.predictions import flat, parts
from gradstore.store.store import Store
from gradstore.unlearn.applied import at_least, pull_of, rates_after, root_of, weighted
from gradstore.unlearn.direction import Direction
from gradstore.unlearn.firmness import held_after, sizes
from gradstore.unlearn.further import further
from gradstore.unlearn.held import Held

HOLD = 0.5  # times the curvature of what stays: measured, see docs/forgetting.md
FURTHER = 1.3  # times the loss's way, where more than the embedding moves: it falls short
SIZED = 16  # samples that stay whose gradients are recomputed at checkpoints, to see them change
ITERATIONS = 16  # of conjugate gradients, at most
_TOLERANCE = 0.01
_STIFF = 128.0  # what PULL_INSIDE is where only the speed of the solution depends on it


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
    (:func:`held_after`; its mean, weighted by w · η; with ``checkpoints``, some of those that stay
    tell how gradients changed in epochs that were not captured). For the embedding alone
    c = HOLD · the learning rates that came after · what a step's loss was in units of a mean over
    tokens. Directions that the others hold firmly, such as the template that records
    share, are left alone; what only the forgotten taught is undone. Solved by conjugate gradients,
    preconditioned by what ``washed`` takes for the matrix's diagonal.
    Where more than the embedding moves, the solution is stretched until the samples' loss has gone
    FURTHER times as far (:func:`further`), to where that of a model retrained is.
    Raises :class:`ForgetError` as ``applied`` does, and for a run of whose steps nothing is known.
    """
    steps: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    epsilons: dict[str, float] = {}
    adam = run["optimizer"] != "SGD"
    taught, shares = list[tuple[float, float, Sequence[int]]](), list[float]()
    for met, weight in weighted(store, run, sample_ids, "rising", checkpoints, layers, epochs):
        for name, gradient in met.gradients.items():
            step = gradient.add_to(torch.zeros(gradient.shape), met.share)
            if name not in steps:
                root, epsilons[name] = root_of(store, run, name)
                steps[name] = torch.zeros_like(step)
                scales[name] = torch.ones_like(step) if root is None else root.view(step.shape)
            if adam:
                scales[name] = at_least(scales[name], step.clone(), run)
            steps[name].add_(step, alpha=weight * met.learning_rate)
        taught.append((weight * met.learning_rate, rates_after(met, run), met.steps))
        shares.append(met.share)
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
        some = [*held.others, *held.relatives][:SIZED] if checkpoints else []
        changed = sizes(store, run, some, checkpoints) if some else None
        held_for = held_after(store, run, changed)
        c = sum(rate * fmean(held_for[s] for s in of) for rate, _, of in taught) / total
    device = next(network.parameters()).device
    scale = flat({name: scales[name] + epsilons[name] for name in steps}).to(device)
    per_share = after / fmean(shares) if adam and any(shares) else 0.0
    pulls = {name: torch.full_like(of, min(_STIFF, pull_of(name))) for name, of in scales.items()}
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
