"""Does forgetting hold against a reference that never saw the records: pure checks.

All work on any causal language models and token ids; no store is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor, nn

from gradstore.evaluate.attacks import ROUNDINGS, RelearnSettings, gain, relearn, rounded
from gradstore.evaluate.divergence import Divergences, divergences, per_token
from gradstore.evaluate.divergence import nearer as gap_of
from gradstore.evaluate.loss import sample_losses
from gradstore.evaluate.statistics import auc, estimate

HALF = 0.5  # of the way from the original: nearer to the reference than to having done nothing


@dataclass(frozen=True)
class Check:
    """One thing that was checked, and what was found; ``passed`` None: it could not be tried."""

    check: str
    passed: bool | None
    found: str


@dataclass(frozen=True)
class Standing:
    """Where a model stands between original (0 and 1) and reference (1 and 0).

    ``way``: of the forgotten's mean loss to its target. ``remaining``: R_f, KL(reference ‖ model) /
    KL(reference ‖ original) per token of the forgotten. NaN where there is no way to go.
    """

    way: float
    remaining: float

    @property
    def forgotten(self) -> bool:
        """Whether both are nearer to the reference than to the original."""
        return abs(1 - self.way) <= HALF and self.remaining <= HALF

    def __str__(self) -> str:
        return f"loss {self.way:.0%} of the way, R_f {self.remaining:.2f}"


def third_bar(
    reference: nn.Module,
    unlearned: nn.Module,
    original: nn.Module,
    forgotten: Sequence[Tensor],
    held_out: Sequence[Tensor],
    *,
    target: float | None = None,
    settings: RelearnSettings | None = None,
) -> list[Check]:
    """Membership, relearning and rounding of ``unlearned`` against ``reference``, in that order.

    Samples are 1-D token ids; ``target`` is the loss that the forgotten should have (nats per
    token; default: the reference's). The bar is taken where every check's ``passed`` is true. A
    model that was not forgotten in the first place has no verdict to lose: its rounding is None.
    Raises :class:`~gradstore.errors.EvaluateError`.
    """
    settings = settings or RelearnSettings()
    models = (original, unlearned, reference)
    before, now, aim = (sample_losses(model, forgotten) for model in models)
    outside, outside_reference = (sample_losses(m, held_out) for m in (unlearned, reference))
    curves, theirs = (
        [each.rest for each in relearn(model, forgotten, settings, held_out)]
        for model in (unlearned, reference)
    )
    end = float(aim.mean()) if target is None else target
    apart = divergences(reference, original, forgotten)
    states = {}
    for name in ("as it is", *ROUNDINGS):
        model: Any = unlearned if name == "as it is" else rounded(unlearned, name)  # type: ignore[arg-type]
        losses = now if name == "as it is" else sample_losses(model, forgotten)
        here = divergences(reference, model, forgotten)
        states[name] = standing(float(before.mean()), float(losses.mean()), end, here, apart)
    return [
        membership(now, outside, aim, outside_reference),
        relearning(curves, theirs),
        rounding(states),
    ]


def standing(
    before: float, now: float, target: float, remaining: Divergences, apart: Divergences
) -> Standing:
    """From mean losses (nats per token), KL(reference ‖ model) and KL(reference ‖ original)."""
    nothing = per_token(apart).value
    way = (now - before) / (target - before) if target > before else math.nan
    return Standing(way, per_token(remaining).value / nothing if nothing > 0 else math.nan)


def membership(
    forgotten: ArrayLike,
    held_out: ArrayLike,
    forgotten_reference: ArrayLike,
    held_out_reference: ArrayLike,
) -> Check:
    """Is the AUC of forgotten against held-out losses within the reference's bootstrap interval?

    Losses are 1-D, the unlearned model's first, then the reference's, of the same samples.
    Each model's own held-out losses calibrate its forgotten ones. Of one record the interval says
    only how much the held-out vary: retraining with another seed would vary more.
    """
    if not len(np.asarray(held_out)):
        return Check("membership", None, "no held-out samples to compare the forgotten with")
    found = auc(-np.asarray(forgotten), -np.asarray(held_out))
    theirs = estimate(auc, -np.asarray(forgotten_reference), -np.asarray(held_out_reference))
    said = (
        f"AUC {found:.3f} (1: known, 0: stands out); the reference's is {theirs.value:.3f}, "
        f"{theirs.low:.3f} to {theirs.high:.3f}"
    )
    return Check("membership", found in theirs, said)


def relearning(curves: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Check:
    """Do the curves not fall faster than the reference's, by more than these vary over seeds?

    Curves of the rest's losses (:class:`~gradstore.evaluate.attacks.Relearned`), of the same seeds.
    The mean :func:`~gradstore.evaluate.attacks.gain` may be above the reference's by as much as the
    reference's gains deviate over seeds (their standard deviation; 0 of one seed).
    """
    pairs = list(zip(curves, theirs, strict=True))
    ours = fmean(gain(curve, reference) for curve, reference in pairs)
    gains = [gain(reference, reference) for reference in theirs]
    spread = stdev(gains) if len(gains) > 1 else 0.0
    said = (
        f"the rest's loss fell by {ours:.3f} nats on average over {len(theirs[0]) - 1} steps; the "
        f"reference's by {fmean(gains):.3f} ± {spread:.3f} over {len(gains)} seeds"
    )
    return Check("relearning", ours - fmean(gains) <= spread, said)


def rounding(states: Mapping[str, Standing]) -> Check:
    """Is the model forgotten still after every rounding? The first state is the one before."""
    first, *others = states.values()
    said = "; ".join(f"{name}: {state}" for name, state in states.items())
    if not first.forgotten:
        return Check("rounding", None, f"not forgotten in the first place: {said}")
    return Check("rounding", all(state.forgotten for state in others), said)


def nearer(to_reference: Divergences, to_original: Divergences) -> Check:
    """Is the model nearer to the reference than to the original, by the whole interval?

    KL(reference ‖ model) and KL(original ‖ model) of the same samples.
    """
    gap = gap_of(to_reference, to_original)
    said = (
        f"{per_token(to_reference).value:.4f} nats per token from the reference, "
        f"{per_token(to_original).value:.4f} from the original; difference {gap.value:+.4f}, "
        f"{gap.low:+.4f} to {gap.high:+.4f}"
    )
    return Check("nearer", gap.high < 0, said)


def extraction(ours: ArrayLike, theirs: ArrayLike) -> Check:
    """Does the model say no secret that the reference does not say? 0 or 1 of each, in order.

    A secret is said where any decoding finds it: greedy, or beam search.
    """
    said, expected = np.asarray(ours), np.asarray(theirs)
    found = (
        f"of {len(said)} secrets of the forgotten the model says {int(said.sum())}, the reference "
        f"{int(expected.sum())} (by greedy decoding or beam search)"
    )
    return Check("extraction", not bool((said > expected).any()), found)
