"""Which stored gradients of a run are scored, and what each counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradstore.capture.schedule import Schedule
from gradstore.errors import InfluenceError
from gradstore.influence.query import Query
from gradstore.influence.rows import Place
from gradstore.store.store import Store

WEIGHT = "learning_rate * batch_share * grad_scale"  # columns of the catalog's ``exposures``


@dataclass(frozen=True)
class Exposed:
    """A stored gradient, the number of its segment, and what its product counts in the score."""

    sample_id: int
    epoch: int
    segment: int
    weight: float
    place: Place


def exposures(
    store: Store,
    run: Mapping[str, Any],
    epochs: str,
    queries: Sequence[Query],
    among: Sequence[int] | None = None,
) -> list[Exposed]:
    """A run's stored gradients, all or those of some samples, by segment and epoch.

    ``epochs`` are those of :class:`gradstore.influence.top.Settings`, less those that a query has
    no gradient of. Raises :class:`InfluenceError` where none is left.
    """
    rows = store.rows(
        f"""SELECT sample_id, epoch, segment_id, {WEIGHT},
                  row_start, "rows", token_start, tail_row
           FROM exposures
           WHERE run_id = ? AND (? OR sample_id IN (SELECT unnest(?::BIGINT[])))
           QUALIFY NOT ? OR row_number() OVER (PARTITION BY sample_id ORDER BY epoch) = 1
           ORDER BY segment_id, epoch, row_start""",
        [run["run_id"], among is None, list(among or ()), epochs == "first"],
    )
    wanted = Schedule.parse(epochs)
    asked = {
        epoch
        for epoch in {epoch for _, epoch, *_ in rows}
        if wanted.wants(epoch, None) and all(query.at(epoch) is not None for query in queries)
    }
    found = [
        Exposed(sample, epoch, segment, weight, Place(*place))
        for sample, epoch, segment, weight, *place in rows
        if epoch in asked
    ]
    check_found(found, run, epochs)
    return found


def check_found(found: Sequence[Exposed], run: Mapping[str, Any], epochs: str) -> None:
    """Raise :class:`InfluenceError` if no gradients are left to score."""
    if not found:
        raise InfluenceError(
            f"{run['name']} stored no gradients of epochs that are asked for and that the query "
            f"has a gradient of (--epochs {epochs}); see `gradstore runs`"
        )
