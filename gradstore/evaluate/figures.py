"""Figures of many samples, by model: means, membership, distances; all with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gradstore.evaluate import general
from gradstore.evaluate.audience import Audience
from gradstore.evaluate.divergence import Divergences, per_token
from gradstore.evaluate.statistics import (
    Estimate,
    auc,
    distance,
    estimate,
    kolmogorov_smirnov,
    mean,
    privleak,
    true_positive_rate,
)

NAMES = ("original", "model", "reference")
ROLES = ("forget", "neighbour", "retained", "holdout")
SCORES = {  # of membership, by sign
    "loss": -1, "zlib_ratio": -1, "min_k": 1, "min_k_plus_plus": 1, "gradnorm": -1,
    "loss_above_reference": -1,
}  # fmt: skip

Values = dict[str, NDArray[np.float64]]  # each metric of every member of the audience; NaN for none


@dataclass(frozen=True)
class Measured:
    """What was measured of the models that were given, on the audience.

    ``apart``: KL(one ‖ other) of every member by (one, other), also to the model rounded, by the
    rounding's name. ``curves``: of relearning, by model and seed. ``general``: the losses in a
    general text's windows, by model.
    """

    audience: Audience
    values: Mapping[str, Values]
    apart: Mapping[tuple[str, str], Divergences]
    curves: Mapping[str, list[list[float]]] = field(default_factory=dict)
    general: Mapping[str, general.Nats] = field(default_factory=dict)

    def of(self, name: str, role: str, metric: str = "loss") -> NDArray[np.float64]:
        """A metric of a role's samples, those that have it."""
        found = self.values[name][metric][self.audience.of(role)]
        return found[~np.isnan(found)]

    def membership(self, name: str, metric: str) -> list[NDArray[np.float64]]:
        """Scores of the forgotten and the held-out, higher for better known ones."""
        return [SCORES[metric] * self.of(name, role, metric) for role in ("forget", "holdout")]

    def divergence(self, one: str, other: str, role: str) -> Divergences:
        """KL(one ‖ other) of a role's samples."""
        return [self.apart[one, other][at] for at in self.audience.of(role)]


@dataclass(frozen=True)
class Figure:
    """A metric of a role's samples, by model."""

    metric: str
    role: str
    samples: int
    values: Mapping[str, Estimate]


def figures(measured: Measured) -> list[Figure]:
    """Every figure that what was measured allows."""
    found = _means(measured)
    if measured.audience.of("holdout"):
        found += _memberships(measured)
    if "reference" in measured.values:
        found += _against_reference(measured)
    return found + _general(measured)


def _means(measured: Measured) -> list[Figure]:
    found = []
    for metric in measured.values["model"]:
        for role in ROLES:
            if count := len(measured.of("model", role, metric)):
                by = {
                    name: estimate(mean, measured.of(name, role, metric))
                    for name, values in measured.values.items()
                    if metric in values
                }
                found.append(Figure(metric, role, count, by))
    return found


def _memberships(measured: Measured) -> list[Figure]:
    found, count = [], len(measured.audience.of("forget"))
    wanted = [("auc", auc, metric) for metric in SCORES if metric in measured.values["model"]]
    for prefix, statistic, metric in [*wanted, ("tpr_at_1_fpr", true_positive_rate, "loss")]:
        by = {
            name: estimate(statistic, *measured.membership(name, metric))
            for name, values in measured.values.items()
            if metric in values
        }
        found.append(Figure(f"{prefix}_{metric}", "forget", count, by))
    return found


def _against_reference(measured: Measured) -> list[Figure]:
    """Figures that a reference is needed for; it has none itself.

    ``ks_loss`` and ``ks_probability`` are Kolmogorov-Smirnov's distance between the forgotten
    samples' losses (mean probabilities of a token) with a model and with the reference, the figures
    in ``_p`` its chance if nothing differs. Intervals draw records, each with its figures under
    both models.
    """
    found: list[Figure] = []
    count = len(measured.audience.of("forget"))
    others: list[str] = [name for name in measured.values if name != "reference"]
    if measured.audience.of("holdout"):
        leak = {
            name: estimate(
                _privleak,
                *[_pairs(measured, name, "min_k", role) for role in ("forget", "holdout")],
            )
            for name in others
        }
        found.append(Figure("privleak_min_k", "forget", count, leak))
    for name, metric in (("ks_loss", "loss"), ("ks_probability", "mean_probability")):
        pairs = {one: _pairs(measured, one, metric) for one in others}
        gap = {one: estimate(distance, rows) for one, rows in pairs.items()}
        p = {one: _bare(kolmogorov_smirnov(*rows.T.tolist())[1]) for one, rows in pairs.items()}
        found += [Figure(name, "forget", count, gap), Figure(f"{name}_p", "forget", count, p)]
    for role in ROLES:
        if size := len(measured.audience.of(role)):
            by = {name: per_token(measured.divergence("reference", name, role)) for name in others}
            found.append(Figure("kl_to_reference", role, size, by))
    return found


def _privleak(inside: NDArray[np.float64], outside: NDArray[np.float64]) -> float:
    """Of scores (n, 2) with a model and with the reference."""
    of_model, of_reference = (auc(inside[:, at], outside[:, at]) for at in (0, 1))
    return privleak(of_model, of_reference)


def _pairs(measured: Measured, name: str, metric: str, role: str = "forget") -> NDArray[np.float64]:
    """A metric of each of a role's samples, with a model and with the reference; (n, 2)."""
    at = measured.audience.of(role)
    rows = np.column_stack([measured.values[of][metric][at] for of in (name, "reference")])
    return rows[~np.isnan(rows).any(1)]


def _general(measured: Measured) -> list[Figure]:
    if not measured.general:
        return []
    count = len(measured.general["model"])
    return [
        Figure(
            metric.__name__,
            "general",
            count,
            {name: metric(nats) for name, nats in measured.general.items()},
        )
        for metric in (general.loss, general.perplexity)
    ]


def _bare(value: float) -> Estimate:
    return Estimate(value, math.nan, math.nan)
