"""Whose losses are followed: the samples in question, and some that stay or were held out."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

from torch import Tensor

from gradstore.store.store import Store

RETAINED_MEASURED = 64  # samples that stay, drawn at random, whose loss is followed
HOLDOUT_MEASURED = 128


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

    def joined(
        self, members: list[tuple[str, str]], numbers: dict[str, int], tokens: list[Tensor]
    ) -> Audience:
        """With more members, the arguments as those of the audience itself."""
        everyone, known = self.members + members, self.numbers | numbers
        return Audience(everyone, known, self.tokens + tokens, self._gone)

    def strangers(self, store: Store, run: dict[str, Any], count: int, seed: int) -> list[int]:
        """Samples that stay: of those that are not measured, as far as there are."""
        others = self.others(store, run)
        draw = random.Random(seed)
        numbers = draw.sample(others, min(count, len(others)))
        measured = [self.numbers[self.members[at][0]] for at in self.of("retained")]
        numbers += draw.sample(measured, min(count - len(numbers), len(measured)))
        return sorted(numbers)

    def others(self, store: Store, run: dict[str, Any]) -> list[int]:
        """Samples that stay and are not measured."""
        return self._met(store, run, self.numbers)

    def staying(self, store: Store, run: dict[str, Any]) -> list[int]:
        """All samples that stay."""
        return self._met(store, run, [i for i, role in self.members if role == "forget"])

    def _met(self, store: Store, run: dict[str, Any], but: Collection[str]) -> list[int]:
        rows = store.rows(
            """SELECT DISTINCT sample_id FROM exposures JOIN samples USING (sample_id)
               WHERE run_id = ? AND NOT list_contains(?, id) ORDER BY sample_id""",
            [run["run_id"], [*but, *self._gone]],
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
