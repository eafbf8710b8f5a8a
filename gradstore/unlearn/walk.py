"""The path of a forget request: the model moved along a direction, its losses measured there."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradstore.capture.layers import parameter
from gradstore.errors import ForgetError
from gradstore.evaluate.loss import sample_losses
from gradstore.store.store import Store
from gradstore.unlearn.dose import Path, Point
from gradstore.unlearn.forecast import Forecast, forecast
from gradstore.unlearn.neighbours import most_exposed

RETAINED_MEASURED = 64  # samples that stay, drawn at random, whose loss is followed
HOLDOUT_MEASURED = 128
NEIGHBOURS_MEASURED, NEIGHBOURS_AMONG = 16, 1024


class Audience:
    """The samples whose losses are followed, with their roles: forget, retained, holdout,
    neighbour."""

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

    def with_neighbours(
        self,
        store: Store,
        run: dict[str, Any],
        update: Float[Tensor, "V d"],
        seed: int,
        held: Collection[int] = (),
    ) -> Audience:
        """With those that an update of the embedding is about to hit most, as ``neighbour``.

        They are looked for among ``NEIGHBOURS_AMONG`` samples that stay and are not measured yet;
        not those ``held`` that the update was made to spare.
        """
        others = [number for number in self._others(store, run) if number not in held]
        drawn = random.Random(seed).sample(others, min(NEIGHBOURS_AMONG, len(others)))
        hit = most_exposed(store, run, update, drawn, NEIGHBOURS_MEASURED)
        tokens = store.tokens(hit, run["run_id"])
        names = dict(
            store.rows("SELECT sample_id, id FROM samples WHERE list_contains(?, sample_id)", [hit])
        )
        return Audience(
            self.members + [(names[number], "neighbour") for number in hit],
            self.numbers | {names[number]: number for number in hit},
            self.tokens + [tokens[number] for number in hit],
            self._gone,
        )

    def strangers(self, store: Store, run: dict[str, Any], count: int, seed: int) -> list[int]:
        """Samples that stay: of those that are not measured, as far as there are."""
        others = self._others(store, run)
        draw = random.Random(seed)
        numbers = draw.sample(others, min(count, len(others)))
        measured = [self.numbers[self.members[at][0]] for at in self.of("retained")]
        numbers += draw.sample(measured, min(count - len(numbers), len(measured)))
        return sorted(numbers)

    def _others(self, store: Store, run: dict[str, Any]) -> list[int]:
        """Samples that stay and are not measured."""
        rows = store.rows(
            """SELECT DISTINCT sample_id FROM exposures JOIN samples USING (sample_id)
               WHERE run_id = ? AND NOT list_contains(?, id) ORDER BY sample_id""",
            [run["run_id"], [*self.numbers, *self._gone]],
        )
        return [number for (number,) in rows]

    def only(self, role: str) -> Audience:
        """A role's members alone."""
        at = self.of(role)
        members = [self.members[place] for place in at]
        numbers = {i: self.numbers[i] for i, _ in members}
        return Audience(members, numbers, [self.tokens[place] for place in at], self._gone)

    def of(self, role: str) -> list[int]:
        """The places of a role's members."""
        return [at for at, (_, each) in enumerate(self.members) if each == role]


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
        forget, retained, holdout = (
            self._mean(losses, role) for role in ("forget", "retained", "holdout")
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
        return Point(dose, forget, retained, holdout, worst)

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
