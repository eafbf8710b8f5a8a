"""The path of a forget request: the model moved along a direction, its losses measured there."""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from gradstore.capture.taps import embedding_of
from gradstore.errors import ForgetError
from gradstore.evaluate.loss import sample_losses
from gradstore.store.store import Store
from gradstore.unlearn.direction import Direction
from gradstore.unlearn.dose import Point

RETAINED_MEASURED = 64  # samples that stay, drawn at random, whose loss is followed
HOLDOUT_MEASURED = 128


class Audience:
    """The samples whose losses are followed, with their roles: forget, retained, holdout."""

    def __init__(
        self,
        members: list[tuple[str, str]],
        numbers: dict[str, int],
        tokens: list[Tensor],
        gone: Collection[str] = (),
    ) -> None:
        self.members, self.numbers, self.tokens, self._gone = members, numbers, tokens, gone

    @classmethod
    def choose(
        cls,
        store: Store,
        run: dict[str, Any],
        forget: dict[str, int],
        seed: int,
        gone: Collection[str] = (),
    ) -> Audience:
        """The samples to forget, and of the others some that ``seed`` draws.

        ``gone`` are ids that earlier requests made the model forget: they do not stay.
        """
        draw = random.Random(seed)
        everyone = store.rows(
            """SELECT DISTINCT id, sample_id, 'retained' AS role FROM exposures
               JOIN samples USING (sample_id) WHERE run_id = ?
               UNION ALL
               SELECT DISTINCT id, sample_id, 'holdout' FROM holdout
               JOIN samples USING (sample_id) WHERE run_id = ? ORDER BY sample_id""",
            [run["run_id"], run["run_id"]],
        )
        chosen = [(i, number, "forget") for i, number in forget.items()]
        for role, count in (("retained", RETAINED_MEASURED), ("holdout", HOLDOUT_MEASURED)):
            others = [m for m in everyone if m[2] == role and m[0] not in {*forget, *gone}]
            chosen += (
                others
                if len(others) <= count
                else sorted(draw.sample(others, count), key=lambda m: m[1])
            )
        numbers = {i: number for i, number, _ in chosen}
        tokens = store.tokens(list(numbers.values()), run["run_id"])
        members = [(i, role) for i, _, role in chosen]
        return cls(members, numbers, [tokens[numbers[i]] for i, _ in members], gone)

    def strangers(self, store: Store, run: dict[str, Any], count: int, seed: int) -> list[Tensor]:
        """Token ids of samples that stay: of those that are not measured, as far as there are."""
        others = store.rows(
            """SELECT DISTINCT sample_id FROM exposures JOIN samples USING (sample_id)
               WHERE run_id = ? AND NOT list_contains(?, id) ORDER BY sample_id""",
            [run["run_id"], [*self.numbers, *self._gone]],
        )
        draw = random.Random(seed)
        numbers = draw.sample([n for (n,) in others], min(count, len(others)))
        measured = [self.numbers[self.members[at][0]] for at in self.of("retained")]
        numbers += draw.sample(measured, min(count - len(numbers), len(measured)))
        return list(store.tokens(sorted(numbers), run["run_id"]).values())

    def of(self, role: str) -> list[int]:
        """The places of a role's members."""
        return [at for at, (_, each) in enumerate(self.members) if each == role]


class Walk:
    """Moves a model's embedding along a direction and measures the audience's losses there."""

    def __init__(self, network: Any, update: Tensor, audience: Audience) -> None:
        self._network, self._audience = network, audience
        self._weight = embedding_of(network).weight
        self._start = self._weight.detach().clone()
        self._update = update.to(self._start.device)
        self._losses: dict[float, list[float]] = {}
        if not float(self._update.norm()):
            raise ForgetError(
                "the stored gradients of these samples, or their learning rates, are zero: nothing "
                "to undo"
            )

    def go_to(self, dose: float) -> None:
        """Leave the model with the direction added ``dose`` times."""
        with torch.no_grad():
            self._weight.copy_(self._start).add_(self._update, alpha=dose)

    def losses(self, dose: float) -> list[float]:
        """Each member's loss there."""
        if dose not in self._losses:
            self.go_to(dose)
            self._losses[dose] = sample_losses(self._network, self._audience.tokens).tolist()
        return self._losses[dose]

    def measure(self, dose: float) -> Point:
        """Mean losses there, by role."""
        losses = self.losses(dose)
        means = []
        for role in ("forget", "retained", "holdout"):
            of_role = [losses[at] for at in self._audience.of(role)]
            means.append(sum(of_role) / len(of_role) if of_role else None)
        assert means[0] is not None
        if not dose and not math.isfinite(means[0]):
            raise ForgetError(
                "the model's loss on these samples is not a finite number: its training diverged; "
                "give a sound checkpoint"
            )
        return Point(dose, means[0], means[1], means[2])

    def first_dose(self, direction: Direction) -> float:
        """A dose small enough to begin a search with."""
        if direction.dose is not None:
            return direction.dose / 8
        return 1e-4 * float(self._start.norm() / self._update.norm())
