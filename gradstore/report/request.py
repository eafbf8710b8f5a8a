"""What the catalog knows of one forget request, as plain values for its page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gradstore.errors import IdError, StoreDamaged
from gradstore.report import words
from gradstore.report.evidence import Checkpoint, Evaluation, checkpoint, evaluations
from gradstore.store.store import Store
from gradstore.unlearn import receipt as receipts

TOKENS = 1600  # shown on a page, all records together: a page stays below 400 kB

Texts = Callable[[Sequence[int]], list[str]]  # what the tokens of a sample say, one by one


@dataclass(frozen=True)
class Token:
    """A predicted token of a forgotten record and its loss in nats; None where it isn't known."""

    text: str
    before: float
    after: float | None
    first_met: float | None

    @property
    def rise(self) -> float | None:
        """What forgetting gave back."""
        return None if self.after is None else self.after - self.before

    @property
    def taken(self) -> float | None:
        """What training had taken."""
        return None if self.first_met is None else self.first_met - self.before


@dataclass(frozen=True)
class Record:
    """A record that was to be forgotten: its ``opening`` token, which nothing predicts, and those
    that follow it, as many of the ``predicted`` as are ``shown``.
    """

    name: str
    before: float
    after: float | None
    target: float | None
    predicted: int
    opening: str
    shown: tuple[Token, ...]


@dataclass(frozen=True)
class Stay:
    """A record that stays, and what the request did to its loss."""

    name: str
    role: str
    before: float
    after: float | None
    forecast: float | None

    @property
    def rise(self) -> float | None:
        """Measured."""
        return None if self.after is None else self.after - self.before

    @property
    def foretold(self) -> float | None:
        """Expected from the overlap of gradients."""
        return None if self.forecast is None else self.forecast - self.before


@dataclass(frozen=True)
class Change:
    """Mean scores of a role's samples, and the worst change of one."""

    role: str
    metric: str
    samples: int
    before: float
    after: float | None
    worst: float | None

    @property
    def change(self) -> float | None:
        """Of the mean."""
        return None if self.after is None else self.after - self.before


@dataclass(frozen=True)
class Point:
    """Mean losses at one dose."""

    dose: float
    forget: float
    retained: float | None
    holdout: float | None
    forecast: float | None
    chosen: bool


@dataclass(frozen=True)
class Target:
    """The loss aimed at or checked against, and the range it is known to."""

    loss: float
    low: float | None
    high: float | None
    source: str | None


@dataclass(frozen=True)
class Receipt:
    """What the catalog says the receipt is, and whether its file still is that."""

    digest: str
    update: str | None  # None: erased
    previous: str | None
    versions: tuple[tuple[str, str], ...]
    holds: bool


@dataclass(frozen=True)
class Request:
    """Everything its page shows; ``trained_with`` are the run's libraries and device."""

    number: int
    run: str
    made: datetime
    seconds: float
    direction: str
    dose_asked: str
    dose: float | None
    target: Target | None
    limit: float | None
    verdict: str
    reason: str
    before: Checkpoint
    after: Checkpoint | None
    settings: tuple[tuple[str, Any], ...]
    notes: tuple[str, ...]
    records: tuple[Record, ...]
    stays: tuple[Stay, ...]
    changes: tuple[Change, ...]
    path: tuple[Point, ...]
    evaluations: tuple[Evaluation, ...]
    receipt: Receipt | None
    trained_with: tuple[tuple[str, Any], ...]
    redacted: bool = False

    def of(self, role: str, metric: str = "loss") -> Change | None:
        """The mean scores of a role."""
        return next((c for c in self.changes if (c.role, c.metric) == (role, metric)), None)

    @property
    def judged(self) -> Evaluation | None:
        """The last evaluation that checked the very checkpoint that was written."""
        found = [e for e in self.evaluations if e.checks and self.wrote(e.model)]
        return found[-1] if found else None

    def wrote(self, model: Checkpoint) -> bool:
        """Whether a checkpoint is the one that the request wrote."""
        return self.after is not None and model.digest == self.after.digest

    @property
    def reference(self) -> float | None:
        """Mean loss of the forgotten with a model that never saw them, if one was evaluated."""
        found = [f for e in self.evaluations for f in e.figures if f.key == ("forget", "loss")]
        return next((f.reference for f in reversed(found) if f.reference is not None), None)


def gather(store: Store, number: int, reader: Callable[[], Texts]) -> Request:
    """All about a request; ``reader`` is asked for once it is known that there is one.

    Raises :class:`IdError` if there is none of that number.
    """
    rows = store.table(
        """SELECT requests.*, runs.name AS run, runs.settings AS run_settings
           FROM requests JOIN runs USING (run_id) WHERE request_id = ?""",
        [number],
    )
    if not rows:
        known = ", ".join(
            str(n) for (n,) in store.rows("SELECT request_id FROM requests ORDER BY 1")
        )
        raise IdError(
            f"the store has no forget request {number}; it has: {known or 'none yet'} "
            "(`gradstore runs` lists them)"
        )
    row = rows[0]
    settings = json.loads(row["settings"] or "{}")
    notes = settings.pop("notes", [])
    scores = store.table(
        """SELECT scores.*, id FROM scores JOIN samples USING (sample_id)
           WHERE request_id = ? ORDER BY sample_id""",
        [number],
    )
    losses = [score for score in scores if score["metric"] == "loss"]
    target = None
    if row["target"] is not None:
        target = Target(
            row["target"], row.get("target_low"), row.get("target_high"), row.get("target_source")
        )
    return Request(
        number,
        row["run"],
        row["created_at"],
        row["seconds"],
        row["direction"],
        row["dose_asked"],
        row["dose"],
        target,
        row["max_holdout_increase"],
        row["verdict"],
        row["reason"],
        Checkpoint(row["model_in"], row["model_in_digest"]),
        checkpoint(row["model_out"], row["model_out_digest"]),
        tuple(settings.items()),
        tuple(notes),
        _records(store, row, [score for score in losses if score["role"] == "forget"], reader()),
        _stays(score for score in losses if score["role"] != "forget"),
        _changes(scores),
        _path(store, number),
        evaluations(store, number, row["model_out_digest"]),
        _receipt(store, number),
        tuple(json.loads(row["run_settings"] or "{}").get("environment", {}).items()),
    )


def _records(
    store: Store, request: dict[str, Any], scores: Sequence[dict[str, Any]], texts: Texts
) -> tuple[Record, ...]:
    kept: dict[int, list[dict[str, Any]]] = {}
    if store.has("token_losses"):
        for row in store.table(
            "SELECT * FROM token_losses WHERE request_id = ? ORDER BY sample_id, position",
            [request["request_id"]],
        ):
            kept.setdefault(row["sample_id"], []).append(row)
    each = max(1, TOKENS // max(1, len(kept)))
    tokens = store.tokens(list(kept), request["run_id"]) if kept else {}
    found = []
    for score in scores:
        rows = kept.get(score["sample_id"], [])
        ids = tokens.get(score["sample_id"])
        said = [] if ids is None else texts(ids.tolist()[: each + 1])
        shown = tuple(
            Token(text, row["before"], row["after"], row["first_met"])
            for text, row in zip(said[1:], rows, strict=False)
        )
        record = Record(
            score["id"],
            score["before"],
            score["after"],
            score.get("target"),
            len(rows),
            said[0] if said else "",
            shown,
        )
        found.append(record)
    return tuple(found)


def _stays(scores: Any) -> tuple[Stay, ...]:
    """The worst hit first."""
    found = [Stay(s["id"], s["role"], s["before"], s["after"], s.get("forecast")) for s in scores]
    return tuple(sorted(found, key=lambda stay: (-_or_most(stay.rise), stay.role, stay.name)))


def _or_most(rise: float | None) -> float:
    return math.inf if rise is None or math.isnan(rise) else rise  # what broke stands first


def _changes(scores: Sequence[dict[str, Any]]) -> tuple[Change, ...]:
    found = []
    metrics = sorted({score["metric"] for score in scores}, key=lambda m: (m != "loss", m))
    for metric in metrics:
        roles = {score["role"] for score in scores if score["metric"] == metric}
        for role in sorted(roles, key=words.place):
            of = [s for s in scores if (s["role"], s["metric"]) == (role, metric)]
            before, after = ([s[when] for s in of] for when in ("before", "after"))
            known = None not in after
            found.append(
                Change(
                    role,
                    metric,
                    len(of),
                    sum(before) / len(of),
                    sum(after) / len(of) if known else None,
                    max(a - b for a, b in zip(after, before, strict=True)) if known else None,
                )
            )
    return tuple(found)


def _path(store: Store, number: int) -> tuple[Point, ...]:
    rows = store.table("SELECT * FROM paths WHERE request_id = ? ORDER BY dose", [number])
    return tuple(
        Point(
            row["dose"],
            row["forget_loss"],
            row["retained_loss"],
            row["holdout_loss"],
            row.get("forecast_loss"),
            row["chosen"],
        )
        for row in rows
    )


def _receipt(store: Store, number: int) -> Receipt | None:
    if number not in receipts.digests(store):
        return None
    [(digest, update)] = store.rows(
        "SELECT digest, update_digest FROM receipts WHERE request_id = ?", [number]
    )
    try:
        document = receipts.read(store, number)
    except (IdError, StoreDamaged):  # the page says that it does not hold
        return Receipt(digest, update, None, (), False)
    holds = receipts.digest_of(document) == digest
    versions = tuple(document.get("versions", {}).items())
    return Receipt(digest, update, document.get("audit", {}).get("previous"), versions, holds)
