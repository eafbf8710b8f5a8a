"""What the catalog knows of one training run, as plain values for its page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gradstore.report.evidence import Checkpoint
from gradstore.store.store import Store


@dataclass(frozen=True)
class Epoch:
    """Mean losses of an epoch: of members as they were met in it, of held-out ones after it."""

    epoch: int
    gradients: int
    members: float | None
    holdout: float | None


@dataclass(frozen=True)
class Held:
    """Segments of one kind in the store."""

    kind: str
    segments: int
    records: int
    bytes: int


@dataclass(frozen=True)
class Accuracy:
    """Relative error |stored − exact| / |exact|, on the gradients that it was measured on."""

    measured: int
    median: float
    largest: float


@dataclass(frozen=True)
class Asked:
    """A request that was made on the run."""

    number: int
    made: datetime
    direction: str
    records: int
    verdict: str
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Run:
    """Everything the page of a run shows; ``dense`` is what a gradient takes unfactored, bytes."""

    name: str
    status: str
    started: datetime
    finished: datetime | None
    steps: int | None
    samples: int
    gradients: int
    captured: str
    sides: str
    top_k: int
    checkpoint: Checkpoint | None
    settings: tuple[tuple[str, Any], ...]
    model: tuple[tuple[str, Any], ...]
    epochs: tuple[Epoch, ...]
    held: tuple[Held, ...]
    dense: int
    accuracy: Accuracy | None
    mass_kept: float | None
    asked: tuple[Asked, ...]
    redacted: bool = False

    @property
    def each(self) -> float | None:
        """Bytes on disk per stored gradient, segments only."""
        bytes = sum(held.bytes for held in self.held if held.kind == "gradients")
        return bytes / self.gradients if self.gradients else None


def gather(store: Store, name: str) -> Run:
    """All about a run, by name or number. Raises :class:`IdError` if there is none."""
    row = store.run(name)
    number = row["run_id"]
    optimizer = ("optimizer", "beta1", "beta2", "epsilon", "weight_decay")
    settings = {key: row[key] for key in optimizer} | json.loads(row["settings"] or "{}")
    model = store.model
    [(samples, gradients, mass, measured, median, largest)] = store.rows(
        """SELECT count(DISTINCT sample_id), count(*), avg(mass_kept), count(relative_error),
                  median(relative_error), max(relative_error) FROM exposures WHERE run_id = ?""",
        [number],
    )
    digest = row["checkpoint_digest"]
    return Run(
        row["name"],
        row["status"],
        row["started_at"],
        row["finished_at"],
        row["steps"],
        samples,
        gradients,
        row["epochs_captured"],
        row["sides"],
        row["top_k"],
        None if digest is None else Checkpoint(row["checkpoint"], digest),
        tuple(_flat(settings)),
        tuple((key, value) for key, value in vars(model).items() if value is not None),
        _epochs(store, number),
        tuple(
            Held(*values)
            for values in store.rows(
                """SELECT kind, count(*), sum(records), sum(bytes) FROM segments
                   WHERE run_id = ? GROUP BY kind ORDER BY sum(bytes) DESC, kind""",
                [number],
            )
        ),
        4 * model.vocabulary * model.width,
        Accuracy(measured, median, largest) if measured else None,
        mass,
        tuple(
            Asked(*values)
            for values in store.rows(
                """SELECT request_id, created_at, direction, count(sample_id), verdict,
                          avg(before), avg(after)
                   FROM requests LEFT JOIN (
                       FROM scores WHERE role = 'forget' AND metric = 'loss') USING (request_id)
                   WHERE run_id = ? GROUP BY ALL ORDER BY request_id""",
                [number],
            )
        ),
    )


def _epochs(store: Store, number: int) -> tuple[Epoch, ...]:
    rows = store.rows(
        """SELECT epoch, coalesce(gradients, 0), members, holdout
           FROM (SELECT epoch, count(*) AS gradients, avg(loss) AS members FROM exposures
                 WHERE run_id = ? GROUP BY epoch)
           FULL JOIN (SELECT epoch, avg(loss) AS holdout FROM holdout_losses
                      WHERE run_id = ? GROUP BY epoch) USING (epoch)
           ORDER BY epoch""",
        [number, number],
    )
    return tuple(Epoch(*row) for row in rows)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as (``a.b``, value)."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value
