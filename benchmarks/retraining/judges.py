"""What a model that has forgotten is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gradstore.capture.taps import embedding_of
from gradstore.evaluate.attacks import RelearnSettings
from gradstore.evaluate.check import third_bar
from gradstore.evaluate.divergence import divergences, per_token
from gradstore.evaluate.loss import sample_losses
from gradstore.training.model import load_model
from gradstore.unlearn.request import Outcome
from gradstore.unlearn.target import from_held_out

MEASURED = 60  # retained, and held-out, biographies
MULTIPLES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.6, 2.0, 3.0)  # of the dose given


@dataclass(frozen=True)
class Judges:
    """What the result of a request is held against."""

    reference: nn.Module
    original: nn.Module
    forgotten: list[Tensor]
    retained: list[Tensor]
    held_out: list[Tensor]
    attack: RelearnSettings | None

    def before(self) -> dict[str, Any]:
        """What there is to forget."""
        known = (self.forgotten, self.retained, self.held_out)
        losses = (sample_losses(self.original, of).tolist() for of in known)
        return {
            "held_out_estimate": from_held_out(*losses).loss,
            "before": mean_loss(self.original, self.forgotten),
            "reference": mean_loss(self.reference, self.forgotten),
            "KL_f": self.nothing_done,
            "KL_h_floor": divergence(self.reference, self.original, self.held_out),
        }

    def after(self, unlearned: nn.Module) -> dict[str, Any]:
        """Where a model ended."""
        still = divergence(self.reference, unlearned, self.forgotten)
        return {
            "after": mean_loss(unlearned, self.forgotten),
            "R_f": still / self.nothing_done,
            "Δ": mean_loss(unlearned, self.retained) - self.retained_before,
            "KL_h": divergence(self.reference, unlearned, self.held_out),
        } | self.attacked(unlearned)

    @cached_property
    def nothing_done(self) -> float:
        """KL(reference ‖ original) of the forgotten."""
        return divergence(self.reference, self.original, self.forgotten)

    @cached_property
    def retained_before(self) -> float:
        """The original's loss on those that stay."""
        return mean_loss(self.original, self.retained)

    def attacked(self, unlearned: nn.Module) -> dict[str, bool | None]:
        """Whether what was forgotten looks so to those who test it; None where nothing was."""
        if self.attack is None:
            return {}
        checks = third_bar(
            self.reference, unlearned, self.original, self.forgotten, self.held_out,
            settings=self.attack,
        )  # fmt: skip
        return {check.check: check.passed for check in checks}


def judge(outcome: Outcome, judges: Judges) -> dict[str, Any]:
    """Hold what a request wrote against the reference, at its dose and along its direction."""
    target = outcome.target and asdict(outcome.target)
    facts: dict[str, Any] = {"verdict": outcome.verdict, "target": target, **judges.before()}
    if outcome.out is None or outcome.dose is None:
        return facts
    unlearned = load_model(outcome.out)
    facts |= {"dose": outcome.dose, **judges.after(unlearned)}
    return facts | along(unlearned, outcome.dose, judges)


def swapped(judges: Judges) -> dict[str, Any]:
    """How near the embedding alone can bring the original: with the retrained model's put in."""
    model = deepcopy(judges.original)
    embedding_of(model).load_state_dict(embedding_of(judges.reference).state_dict())
    facts = {"direction": "its embedding", "verdict": "", "dose": 1.0, **judges.before()}
    return facts | judges.after(model) | along(model, 1.0, judges)


def another(judges: Judges, reference: nn.Module) -> dict[str, Any]:
    """How near a second retraining comes: a ``reference`` of another seed."""
    facts = {"direction": "another retraining", "verdict": "", "dose": 1.0, **judges.before()}
    return facts | judges.after(reference)


@torch.no_grad()
def along(unlearned: nn.Module, dose: float, judges: Judges) -> dict[str, Any]:
    """The line from the original through the unlearned model: doses, R_f and Δ; the least R_f."""
    model, path = deepcopy(judges.original), []
    nothing_done = divergence(judges.reference, model, judges.forgotten)
    ends = list(zip(judges.original.parameters(), unlearned.parameters(), strict=True))
    for multiple in MULTIPLES:
        for weight, (start, end) in zip(model.parameters(), ends, strict=True):
            weight.copy_(start + multiple * (end - start))
        distance = divergence(judges.reference, model, judges.forgotten)
        harm = mean_loss(model, judges.retained) - judges.retained_before
        path.append((multiple * dose, distance / nothing_done, harm))
    best, least, _ = min(path, key=lambda point: point[1])
    return {"best_dose": best, "best_R_f": least, "path": path}


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Say of each method of one request whether some dose of ``newton`` beats it."""
    [path] = [row["path"] for row in rows if row["direction"] == "newton" and "R_f" in row] or [[]]
    for row in rows if path else ():
        if row["direction"] != "newton" and "R_f" in row:
            row["beaten"] = beaten(row, path)


def beaten(row: Mapping[str, Any], path: Sequence[tuple[float, float, float]]) -> bool:
    """Whether some point of another method's path is as near as a row's, and harms no more."""
    return any(distance <= row["R_f"] and harm <= row["Δ"] for _, distance, harm in path)


def divergence(reference: nn.Module, model: nn.Module, samples: Sequence[Tensor]) -> float:
    """KL(reference ‖ model) in nats per predicted token."""
    return per_token(divergences(reference, model, samples)).value


def mean_loss(model: nn.Module, samples: Sequence[Tensor]) -> float:
    return float(sample_losses(model, samples).mean())


def spread(samples: Sequence[Any]) -> list[Any]:
    """At most ``MEASURED`` of the samples, evenly spaced."""
    return list(samples[:: max(1, len(samples) // MEASURED)][:MEASURED])
