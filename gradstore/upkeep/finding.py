"""What a check of a store has found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something about a file of a store; a note unless it is ``damage``.

    ``ids`` are the samples whose records, tokens or losses lie there.
    """

    file: str
    what: str
    damage: bool = True
    ids: tuple[str, ...] = ()
