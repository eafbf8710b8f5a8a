"""What was measured, by text, direction and record: rows picked out and compared."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from claims.verdicts import ratio

Row = Mapping[str, Any]
FIXED = "uncalibrated"
BLOCK = r"transformer\.h\.(\d+)\.\*"
NAMED = {"first": "epoch 1", "all": "all epochs"}
PAPER: dict[str, Any] = {"kind": "raw", "epochs": "first", "where": "embedding", "side": None}
OURS = PAPER | {"kind": "applied", "epochs": "all"}


@dataclass(frozen=True)
class Results:
    """All rows of a run; ``copies`` are those of duplicates.py."""

    rows: Sequence[Row]
    scores: Sequence[Row]
    copies: Sequence[Row]
    sizes: Mapping[str, Any]

    # -- which rows ---------------------------------------------------------------------------

    @cached_property
    def texts(self) -> list[str]:
        """What was trained on."""
        return list(dict.fromkeys(row["text"] for row in self.rows))

    @cached_property
    def tied(self) -> list[str]:
        """Those whose model has a tied head."""
        return [text for text in self.texts if "untied" not in text]

    @cached_property
    def epochs(self) -> dict[str, Row]:
        """The ways of either kind, by the epochs that count."""
        last = max(int(row["epochs"]) for row in self.rows if str(row["epochs"]).isdigit())
        later = [str(epoch) for epoch in range(2, last + 1)]
        names = {"raw": ["first", *later, "all"], "applied": ["1", *later, "all"]}
        return {
            f"{kind}, {NAMED.get(epoch, f'epoch {epoch}')}": PAPER | {"kind": kind, "epochs": epoch}
            for kind, epochs in names.items()
            for epoch in epochs
        }

    def layers(self, text: str) -> dict[str, Row]:
        """The ways of either kind, by the weights that move."""
        found = dict[str, Row]()
        for kind, epochs in (("raw", "first"), ("applied", "all")):
            for row in self.rows:
                if (row["text"], row["kind"], row["epochs"]) == (text, kind, epochs):
                    way = {name: row[name] for name in PAPER}
                    found[f"{kind}, {place_of(row['where'], row['side'])}"] = way
        return found

    def last_blocks(self, text: str) -> list[str]:
        """The pattern of the last two blocks, where there are others before them."""
        places = {way["where"] for way in self.layers(text).values()}
        some = sum(re.fullmatch(BLOCK, place) is not None for place in places) > 2
        return [place for place in places if some and "*," in place]

    def of(self, text: str, way: Row, column: str) -> dict[tuple[int, str], float]:
        """A column of a way's rows by (seed, record), without those that have none."""
        return {
            (row["seed"], row["id"]): row[column]
            for row in self.rows
            if row["text"] == text
            and all(row[name] == value for name, value in way.items())
            and row.get(column) is not None
        }

    def ratio_of(self, text: str, one: Row, others: Sequence[Row], column: str) -> Any:
        """R_f of one way over that of others (their geometric mean), of the same records."""
        here, there = self.of(text, one, column), [self.of(text, o, column) for o in others]
        pairs = [
            (value, float(np.exp(np.mean([np.log(of[pair]) for of in there if pair in of]))))
            for pair, value in here.items()
            if any(pair in of for of in there)
        ]
        return ratio(pairs)

    def way(self, text: str, way: Row, column: str) -> dict[tuple[int, str], float]:
        """A loss as a share of the way from the original's to the retrained model's."""
        before, after = (self.of(text, way, name) for name in ("before", "reference"))
        return {
            pair: (loss - before[pair]) / (after[pair] - before[pair])
            for pair, loss in self.of(text, way, column).items()
        }

    @cached_property
    def scored(self) -> dict[tuple[str, str, str], list[Row]]:
        """Rows of scores by text, direction and method."""
        groups: dict[tuple[str, str, str], list[Row]] = {}
        for row in self.scores:
            groups.setdefault((row["text"], row["kind"], row["method"]), []).append(row)
        return groups

    def paths(self) -> Iterator[tuple[str, str, dict[str, list[tuple[float, float]]]]]:
        """Where ascent ends, by text and kind: the paper's direction and ours."""
        for text in self.tied:
            for way in (PAPER, OURS):
                yield text, way["kind"], self.stops(text, way)

    def stops(self, text: str, way: Row) -> dict[str, list[tuple[float, float]]]:
        """Where ascent ends by each rule: (R_f, way), a record each.

        Uncalibrated is the dose that suits the other records of the text: the median of theirs.
        """
        doses, paths = self.of(text, way, "dose"), self.of(text, way, "path")
        before, after = self.of(text, way, "before"), self.of(text, way, "reference")
        estimates, found = self.of(text, OURS, "estimate"), dict[str, list[tuple[float, float]]]()
        for pair in paths:
            dose, r, loss = np.array(paths[pair]).T
            share = (loss - before[pair]) / (after[pair] - before[pair])
            others = [each for other, each in doses.items() if other != pair] or [doses[pair]]
            guess = (estimates[pair] - before[pair]) / (after[pair] - before[pair])
            rising = np.maximum.accumulate(share)
            stops = {
                FIXED: float(np.median(others)) / doses[pair],
                "estimated loss": float(np.interp(guess, rising, dose)),
                "retrained loss": 1.0,
                "least R_f": float(dose[r.argmin()]),  # of which doing nothing is one
            }
            for name, at in stops.items():
                ends = float(np.interp(at, dose, r)), float(np.interp(at, dose, share))
                found.setdefault(name, []).append(ends)
            falls = float((np.diff(share[dose <= 1]) < 0).any())
            found.setdefault("falls", []).append((falls, falls))
        return found


def place_of(where: str, side: str | None) -> str:
    """A pattern of layers in words."""
    if side is not None:
        return f"embedding, {side} side"
    if where == "all":
        return "whole model"
    if "*," in where:
        return "last two blocks"
    if match := re.fullmatch(BLOCK, where):
        return f"block {int(match[1]) + 1}"
    return {"head": "lm_head", "embedding,head": "embedding and lm_head"}.get(where, where)
