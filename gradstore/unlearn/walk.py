"""The path of a forget request: the model moved along a direction, its losses measured there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from gradstore.capture.layers import parameter
from gradstore.errors import ForgetError
from gradstore.evaluate.audience import Audience
from gradstore.evaluate.loss import sample_losses
from gradstore.unlearn.dose import Path, Point
from gradstore.unlearn.forecast import Forecast, forecast


@dataclass(frozen=True)
class Moved:
    """What steps add up to, by the weights' names (rows, columns), to be added once.

    ``reached``: they met the target. ``ended`` says what else ended them, None: the limits.
    ``unfinished`` is the file that holds the sum until the request is recorded, if one does.
    """

    updates: Mapping[str, Tensor]
    reached: bool
    ended: str | None = None
    unfinished: File | None = None


class Walk:
    """Moves a model's weights along a direction and measures the audience's losses there."""

    def __init__(self, network: Any, updates: Mapping[str, Tensor], audience: Audience) -> None:
        self._network, self._audience = network, audience
        self._moves = []  # weight, its start, its update
        for name, update in updates.items():
            weight = parameter(network, name)
            start = weight.detach().clone()
            self._moves.append((weight, start, update.view(start.shape).to(start.device)))
        self._losses: dict[float, list[float]] = {}
        if not any(bool(update.any()) for *_, update in self._moves):
            raise ForgetError(
                "the stored gradients of these samples, or their learning rates, are zero: nothing "
                "to undo"
            )

    def go_to(self, dose: float) -> None:
        """Leave the model with the direction added ``dose`` times."""
        with torch.no_grad():
            for weight, start, update in self._moves:
                weight.copy_(start).add_(update, alpha=dose)

    def losses(self, dose: float) -> list[float]:
        """Each member's loss there."""
        if dose not in self._losses:
            self.go_to(dose)
            self._losses[dose] = sample_losses(self._network, self._audience.tokens).tolist()
        return self._losses[dose]

    def measure(self, dose: float) -> Point:
        """Mean losses there, by role."""
        losses = self.losses(dose)
        forget, retained, holdout, neighbours = (
            self._mean(losses, role) for role in ("forget", "retained", "holdout", "neighbour")
        )
        assert forget is not None
        if not dose and not math.isfinite(forget):
            raise ForgetError(
                "the model's loss on these samples is not a finite number: its training diverged; "
                "give a sound checkpoint"
            )
        stay = self._audience.of("retained") + self._audience.of("neighbour")
        before = self.losses(0.0)
        worst = max((losses[at] - before[at] for at in stay), default=None)
        return Point(dose, forget, retained, holdout, worst, neighbours=neighbours)

    def _mean(self, losses: list[float], role: str) -> float | None:
        of_role = [losses[at] for at in self._audience.of(role)]
        return sum(of_role) / len(of_role) if of_role else None

    @cached_property
    def forecast(self) -> Forecast | None:
        """What the start of the path tells of it, None for a model without forward derivatives."""
        self.go_to(0.0)
        names = {id(weight): name for name, weight in self._network.named_parameters()}
        updates = {names[id(weight)]: update.to(weight) for weight, _, update in self._moves}
        try:
            return forecast(self._network, updates, self._audience.tokens)
        except ForgetError:
            return None

    def points(self, path: Path) -> list[Point]:
        """A path's points with what was foretold of them."""
        if (foreseen := self.forecast) is None:
            return path.points
        mine = foreseen.of(self._audience.of("forget"))
        return [replace(p, forecast=float(mine.at(p.dose).mean())) for p in path.points]

    def first_dose(self, target: float) -> float:
        """A dose below the target to begin a search with: half of what is forecast to meet it."""
        foreseen = self.forecast
        expected = (
            None if foreseen is None else foreseen.of(self._audience.of("forget")).dose_for(target)
        )
        if expected:
            return expected / 2
        starts = math.hypot(*(float(start.norm()) for _, start, _ in self._moves))
        return 1e-4 * starts / math.hypot(*(float(update.norm()) for *_, update in self._moves))
