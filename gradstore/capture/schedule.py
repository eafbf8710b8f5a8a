"""Which exposures to keep: ``first``, ``all``, ``every:N`` or a list of epochs."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FORMS = "first, all, every:N, or epochs such as 1,3,6 or 2-5"


@dataclass(frozen=True)
class Schedule:
    """The epochs whose gradients are kept; ``epochs`` is empty for ``first`` and ``all``."""

    text: str
    every: int = 0
    epochs: frozenset[int] = frozenset()

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read an ``--epochs-captured`` value; raises ``ValueError`` saying what is allowed."""
        if text in ("first", "all"):
            return cls(text)
        if match := re.fullmatch(r"every:([1-9]\d*)", text):
            return cls(text, every=int(match[1]))
        epochs: set[int] = set()
        for part in text.split(","):
            match = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", part.strip())
            if not match:
                raise ValueError(f"{text!r} names no epochs; expected {_FORMS}")
            epochs |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
        if not epochs:
            raise ValueError(f"{text!r} names no epochs; expected {_FORMS}")
        return cls(text, epochs=frozenset(epochs))

    def wants(self, epoch: int, seen: set[int] | None) -> bool:
        """Whether a sample's exposure in ``epoch`` is kept, given the epochs kept of it so far.

        ``first`` means "not in the catalog for this run yet", so it survives resuming.
        """
        if seen and (self.text == "first" or epoch in seen):
            return False
        if self.every:
            return epoch % self.every == 0
        return not self.epochs or epoch in self.epochs
