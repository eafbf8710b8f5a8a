"""Which way to move the embedding so that samples are forgotten."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradstore.errors import ForgetError
from gradstore.store.record import Exposure, Record
from gradstore.store.store import Store
from gradstore.unlearn import controls
from gradstore.unlearn.curvature import GaussNewton, conjugate_gradients

DIRECTIONS = ("applied", "newton", "raw", "fresh", "random")
WEIGHTS = ("washed", "rising", "uniform")
Kind = Literal["applied", "newton", "raw", "fresh", "random"]

PULL = 4.0  # times its own curvature: an entry is also held by those it is coupled to
HOLD = 0.5  # times the curvature of what stays, in ``newton``: measured, see docs/forgetting.md
HALF = 0.5  # the dose that suits steps whose washing-out is not reckoned
_ITERATIONS, _TOLERANCE = 12, 0.01


@dataclass(frozen=True)
class Direction:
    """``update`` (V, d): adding α times it to the embedding raises the samples' loss.

    ``dose`` is the α it is made for, None if its length means nothing; ``weights`` what exposures
    were weighted by, None where there is one of each sample.
    """

    kind: Kind
    update: Float[Tensor, "V d"]
    dose: float | None
    exposures: int
    weights: str | None = None


def find(
    kind: str,
    store: Store,
    run: dict[str, Any],
    sample_ids: Sequence[int],
    network: nn.Module,
    *,
    retained: Sequence[Tensor],
    weights: str | None,
    seed: int,
) -> Direction:
    """The direction of a kind; ``retained`` are token ids of samples that stay, for ``newton``.

    Raises :class:`ForgetError` for an unknown kind, or what cannot be had from the store.
    """
    if kind == "applied":
        return applied(store, run, sample_ids, weights)
    if kind == "newton":
        if not retained:
            raise ForgetError("nothing stays that could hold the model: give --direction applied")
        return newton(store, run, sample_ids, network, retained)
    if kind not in DIRECTIONS:
        raise ForgetError(f"{kind!r} is no direction; give one of {', '.join(DIRECTIONS)}")
    first = raw(store, run, sample_ids)  # refuses what the run was not trained on
    if kind == "raw":
        return first
    tokens = list(store.tokens(list(sample_ids), run["run_id"]).values())
    if kind == "fresh":
        return replace(first, kind="fresh", update=controls.fresh(network, tokens))
    return replace(first, kind="random", update=controls.random(first.update, tokens, seed))


def raw(store: Store, run: dict[str, Any], sample_ids: Sequence[int]) -> Direction:
    """The sum of the samples' first stored gradients: ascent as in arXiv 2406.09391.

    The gradient is of each sample's summed loss; the step's length means nothing, so it needs a
    target. Both sides of a tied embedding, where they are stored.
    """
    update, seen = torch.zeros(store.model.vocabulary, store.model.width), set()
    for record in _records(store, run, sample_ids):
        if record.exposure.id not in seen:
            seen.add(record.exposure.id)
            record.gradient(store.model).add_to(update)
    return Direction("raw", update, None, len(seen))


def applied(
    store: Store, run: dict[str, Any], sample_ids: Sequence[int], weights: str | None = None
) -> Direction:
    """What the samples made the optimizer do, with its sign turned: Σ w · η · s · g / √v̂.

    The sum is over the stored exposures; η is the learning rate at each, s what the sample's
    summed loss counted in the step, after clipping; v̂ Adam's bias-corrected second moment at the
    end of the run (√v̂ = 1 for SGD). The weights w (V, d) say what is left of a step:

    ``washed``  1 / (1 + PULL · A · √v̂ / s), with A the sum of the learning rates that came after.
                Later steps pull an entry back at the rate η · F / √v̂ with F its curvature, and v̂
                tells it: a step's gradient is noise of variance s · F, so F = v̂ / s.
    ``rising``  epoch ÷ mean epoch, a rule of thumb for the same.
    ``uniform`` 1: as if nothing were washed out.

    None is ``washed`` for Adam and ``rising`` for SGD. Raises :class:`ForgetError` for another
    optimizer, and for a run of whose steps nothing is known.
    """
    root, epsilon = _root_of_second_moment(store, run)
    weights = weights or ("rising" if root is None else "washed")
    if weights == "washed" and root is None:
        raise ForgetError("SGD keeps no second moments to tell what was washed out by: give rising")
    after = _rates_after(store, run) if weights == "washed" else {}
    update, count = torch.zeros(store.model.vocabulary, store.model.width), 0
    for records in _by_epoch(store, run, sample_ids, weights):
        total = torch.zeros_like(update)
        for record, weight in records:
            met = record.exposure
            record.gradient(store.model).add_to(total, weight * met.learning_rate * _share(met))
        if root is not None and after:
            pulls = [after[r.exposure.step] / _share(r.exposure) for r, _ in records]
            total /= 1 + PULL * sum(pulls) / len(pulls) * root
        update += total
        count += len(records)
    if root is not None:
        update /= root + epsilon
    return Direction("applied", update, 1.0 if weights == "washed" else HALF, count, weights)


def newton(
    store: Store,
    run: dict[str, Any],
    sample_ids: Sequence[int],
    network: nn.Module,
    retained: Sequence[Tensor],
) -> Direction:
    """The samples' steps as far as what stays lets go of them: (M + c·G)⁻¹ Σ w · η · s · g.

    M = √v̂ is the optimizer's own scale (1 for SGD), w rises with the epoch, G the Gauss-Newton
    matrix of some ``retained`` samples (token ids) at ``network``. After an exposure, training on
    what stays goes on along −M⁻¹G; this is where it leads in one implicit Euler step of length
    c = HOLD · the learning rates that came after (their mean over the exposures) · what a step's
    loss was in units of a mean over tokens. Directions that the others hold firmly, such as the
    template that records share, are left alone; what only the forgotten taught is undone.
    Raises :class:`ForgetError` as ``applied`` does.
    """
    root, epsilon = _root_of_second_moment(store, run)
    after = _rates_after(store, run)
    steps, held, total, count = torch.zeros(store.model.vocabulary, store.model.width), 0.0, 0.0, 0
    for records in _by_epoch(store, run, sample_ids, "rising"):
        for record, weight in records:
            met = record.exposure
            record.gradient(store.model).add_to(steps, weight * met.learning_rate * _share(met))
            held += weight * met.learning_rate * after[met.step]
            total += weight * met.learning_rate
            count += 1
    [(in_tokens,)] = store.rows(
        """SELECT avg(of_step) FROM (SELECT sum(batch_share * grad_scale * scored_tokens) AS of_step
           FROM exposures WHERE run_id = ? GROUP BY step)""",
        [run["run_id"]],
    )
    c = HOLD * held / total * in_tokens if total else 0.0
    device = next(network.parameters()).device
    scale = 1.0 if root is None else (root + epsilon).to(device)
    curvature = GaussNewton(network, retained)
    solved = conjugate_gradients(
        lambda v: scale * v + c * curvature(v),
        steps.to(device),
        scale,
        iterations=_ITERATIONS,
        tolerance=_TOLERANCE,
    )
    return Direction("newton", solved.x.cpu(), 1.0, count, "rising")


def _by_epoch(
    store: Store, run: dict[str, Any], sample_ids: Sequence[int], weights: str
) -> Iterator[list[tuple[Record, float]]]:
    """Records with their weights, the records of an epoch together."""
    by_epoch: dict[int, list[Record]] = defaultdict(list)
    epochs: dict[str, list[int]] = defaultdict(list)
    for record in _records(store, run, sample_ids):
        by_epoch[record.exposure.epoch].append(record)
        epochs[record.exposure.id].append(record.exposure.epoch)
    mean = {sample: sum(of) / len(of) for sample, of in epochs.items()}
    for epoch, records in sorted(by_epoch.items()):
        yield [(r, epoch / mean[r.exposure.id] if weights == "rising" else 1.0) for r in records]


def _share(met: Exposure) -> float:
    return met.batch_share * met.grad_scale


def _rates_after(store: Store, run: dict[str, Any]) -> dict[int, float]:
    """For each step of a run the sum of the learning rates of those after it."""
    steps = store.rows(
        "SELECT step, learning_rate FROM steps WHERE run_id = ? ORDER BY step DESC", [run["run_id"]]
    )
    if not steps:
        raise ForgetError(
            f"{run['name']} kept no list of its steps, so how much training came after a record is "
            "not known; give --direction applied --weights rising"
        )
    sums = accumulate((rate for _, rate in steps), initial=0.0)
    return {step: after for (step, _), after in zip(steps, sums, strict=False)}


def _records(store: Store, run: dict[str, Any], sample_ids: Sequence[int]) -> list[Record]:
    records = list(store.records(sample_ids, run["run_id"]))
    held = {record.exposure.id for record in records}
    for sample in store.rows(
        "SELECT id FROM samples WHERE list_contains(?, sample_id)", [list(sample_ids)]
    ):
        if sample[0] not in held:
            raise ForgetError(
                f"{sample[0]!r} has no gradient in {run['name']}: it was held out or never met; "
                f"see `gradstore show {sample[0]}`"
            )
    return records


def _root_of_second_moment(store: Store, run: dict[str, Any]) -> tuple[Tensor | None, float]:
    """√v̂ at the end of the run (None for SGD), and ε."""
    kept = store.moments(run["run_id"], "embedding", "end")
    if kept is None:
        if run["optimizer"] == "SGD":
            return None, 0.0
        raise ForgetError(
            f"{run['name']} kept no second moments of {run['optimizer']} at its end, so what it "
            "applied is not known (an unfinished run, or an optimizer that is neither Adam nor "
            "SGD); use --direction raw"
        )
    v, step = kept
    correction = 1 - (run["beta2"] or 0.0) ** step
    return (v / correction).sqrt(), run["epsilon"] or 0.0
