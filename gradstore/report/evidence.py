"""Evaluations and attacks on a checkpoint, as plain values for its page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any

from gradstore.report import words
from gradstore.store.store import Store

_STEP = re.compile(r"relearned_loss_(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint lies (None: not to be told), and the SHA-256 over its weight files."""

    path: str | None
    digest: str


@dataclass(frozen=True)
class Figure:
    """A metric of a role's samples, their mean if each has one, with up to three models.

    ``ranges`` are the ends of its 95 % intervals by model, where something varies.
    """

    metric: str
    role: str
    samples: int | None
    original: float | None
    model: float | None
    reference: float | None
    ranges: Mapping[str, tuple[float, float]]

    @property
    def key(self) -> tuple[str, str]:
        """Which one it is."""
        return self.role, self.metric


@dataclass(frozen=True)
class Check:
    """What was checked against the reference; ``passed`` None: it could not be tried."""

    check: str
    passed: bool | None
    found: str


@dataclass(frozen=True)
class Evaluation:
    """One evaluation; ``relearned`` are the losses after each step of the attack."""

    number: int
    made: datetime
    original: Checkpoint | None
    model: Checkpoint
    reference: Checkpoint | None
    passed: bool | None
    checks: tuple[Check, ...]
    said: tuple[str, ...]
    figures: tuple[Figure, ...]
    relearned: tuple[Figure, ...]

    @property
    def metrics(self) -> list[tuple[str, list[Figure]]]:
        """The figures of each metric, the best known metrics first."""
        known = list(words.METRICS)
        order = sorted(
            self.figures,
            key=lambda f: (
                known.index(f.metric) if f.metric in known else len(known),
                f.metric,
                words.place(f.role),
            ),
        )
        return [(metric, list(of)) for metric, of in groupby(order, lambda f: f.metric)]


def evaluations(store: Store, number: int, digest: str | None) -> tuple[Evaluation, ...]:
    """Those that named a request or the checkpoint it wrote, oldest first."""
    if not store.has("evaluations"):
        return ()
    rows = store.table(
        """SELECT * FROM evaluations WHERE request_id = ? OR model_digest = ?
           ORDER BY evaluation_id""",
        [number, digest],
    )
    return tuple(_evaluation(store, row) for row in rows)


def checkpoint(path: str | None, digest: str | None) -> Checkpoint | None:
    """The checkpoint of two columns, if there was one."""
    return None if digest is None else Checkpoint(path, digest)


def _evaluation(store: Store, row: dict[str, Any]) -> Evaluation:
    figures = [
        Figure(metric, role, samples, original, model, reference, _ranges(ends))
        for metric, role, samples, original, model, reference, ends in store.rows(
            """SELECT metric, role, coalesce(max(samples), nullif(count(sample_id), 0)),
                      avg(original), avg(model), avg(reference),
                      [max(original_low), max(original_high), max(model_low), max(model_high),
                       max(reference_low), max(reference_high)]
               FROM measurements m WHERE evaluation_id = ? AND (
                   sample_id IS NULL OR NOT EXISTS (
                       FROM measurements of WHERE of.evaluation_id = m.evaluation_id
                       AND of.metric = m.metric AND of.role = m.role AND of.sample_id IS NULL))
               GROUP BY metric, role ORDER BY metric, role""",
            [row["evaluation_id"]],
        )
    ]
    relearned = [figure for figure in figures if _STEP.fullmatch(figure.metric)]
    settings = json.loads(row["settings"] or "{}")
    return Evaluation(
        row["evaluation_id"],
        row["created_at"],
        checkpoint(row["original"], row["original_digest"]),
        Checkpoint(row["model"], row["model_digest"]),
        checkpoint(row["reference"], row["reference_digest"]),
        row["passed"],
        tuple(Check(**check) for check in settings.get("checks", ())),
        tuple(settings.get("said", ())),
        tuple(figure for figure in figures if figure not in relearned),
        tuple(sorted(relearned, key=lambda figure: int(figure.metric.rsplit("_", 1)[1]))),
    )


def _ranges(ends: list[float | None]) -> dict[str, tuple[float, float]]:
    found = {}
    pairs = zip(ends[::2], ends[1::2], strict=True)
    for name, (low, high) in zip(("original", "model", "reference"), pairs, strict=True):
        if low is not None and high is not None:
            found[name] = (low, high)
    return found
