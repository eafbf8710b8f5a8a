"""The optimizer's steps undone as far as what stays lets go of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from gradstore.influence.curvature import GaussNewton, conjugate_gradients
from gradstore.influence.predictions import flat, parts
from gradstore.store.store import Store
from gradstore.unlearn.applied import at_least, pull_of, rates_after, root_of
from gradstore.unlearn.direction import Direction
from gradstore.unlearn.exposures import Met, met_at, met_by
from gradstore.unlearn.firmness import counted, held_after, sizes
from gradstore.unlearn.further import further
from gradstore.unlearn.held import Held

# measured, see docs/forgetting.md
HOLD = 0.5  # times as firmly, where the embedding alone moves
FURTHER = 1.25  # times the loss's way, where more moves: one step of a linear model falls short
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

    M = √v̂ is the optimizer's own scale (1 for SGD), G the Gauss-Newton matrix of what stays at
    ``network``, of all ``layers`` together, estimated from the strata of ``held``. After an
    exposure, training on what stays goes on along −M⁻¹G for a length of c_k, how firmly the steps
    that came after held the model (:func:`held_after`; with ``checkpoints``, some of those that
    stay tell how gradients changed in epochs that were not captured). It leaves exp(−c_k·M⁻¹G) of
    the exposure's step. One implicit Euler step of length c, the mean of c_k, stands for all of
    them, and w = 2 · exp(−c_k / c) makes it exact for the directions that it halves
    (:func:`counted`). Those that the others hold firmly, such as the template that records share,
    are left alone; what only the forgotten taught is undone. Solved by conjugate gradients,
    preconditioned by what ``washed`` takes for the matrix's diagonal.

    Where the embedding alone moves, c and every c_k are HOLD times as long: the layers around it
    give way too. Where more moves, the solution is stretched until the samples' loss has gone
    FURTHER times as far (:func:`further`), to where that of a model retrained is.
    Raises :class:`ForgetError` as ``applied`` does, and for a run of whose steps nothing is known.
    """
    some = [*held.others, *held.relatives][:SIZED] if checkpoints else []
    changed = sizes(store, run, some, checkpoints) if some else None
    c, rates = 0.0, dict[int, float]()
    if firm := held_after(store, run, changed):
        c, rates = counted(store, run, firm, met_at(store, run, sample_ids, checkpoints, epochs))
    taught = _taught(store, run, met_by(store, run, sample_ids, checkpoints, layers, epochs), rates)
    steps, plain = taught.steps, [*taught.steps] == ["embedding"]
    c *= HOLD if plain else 1.0
    device = next(network.parameters()).device
    scale, diagonal = flat(taught.scales).to(device), flat(taught.diagonal).to(device)
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
    return Direction("newton", updates, 1.0, taught.exposures, "held")


@dataclass(frozen=True)
class _Taught:
    """What samples made the optimizer do: Σ w · η · s · g, and its scale √v̂ + ε, by weight."""

    steps: dict[str, Tensor]
    scales: dict[str, Tensor]
    diagonal: dict[str, Tensor]  # about that of the matrix
    exposures: int


def _taught(
    store: Store, run: dict[str, Any], met: Iterable[Met], rates: Mapping[int, float]
) -> _Taught:
    """Sums exposures, each times the rate that its step, or a usual one of its steps, has."""
    steps: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    epsilons: dict[str, float] = {}
    adam = run["optimizer"] != "SGD"
    weights, afters, shares = list[float](), list[float](), list[float]()
    for each in met:
        afters.append(rates_after(each, run))
        shares.append(each.share)
        weights.append(fmean(rates[step] for step in each.steps))
        for name, gradient in each.gradients.items():
            step = gradient.add_to(torch.zeros(gradient.shape), each.share)
            if name not in steps:
                root, epsilons[name] = root_of(store, run, name)
                steps[name] = torch.zeros_like(step)
                scales[name] = torch.ones_like(step) if root is None else root.view(step.shape)
            if adam:
                scales[name] = at_least(scales[name], step.clone(), run)
            steps[name].add_(step, alpha=weights[-1])
    scales = {name: scale + epsilons[name] for name, scale in scales.items()}
    after = fmean(afters, weights) if any(weights) else 0.0
    per_share = after / fmean(shares) if adam and any(shares) else 0.0
    diagonal = {
        name: scale * (1 + per_share * min(_STIFF, pull_of(name)) * scale)
        for name, scale in scales.items()
    }
    return _Taught(steps, scales, diagonal, len(weights))
