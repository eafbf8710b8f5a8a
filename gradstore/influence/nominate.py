"""Whom to score exactly: the records whose scores, estimated by sketches, are the highest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from gradstore.capture.schedule import Schedule
from gradstore.influence.query import Query
from gradstore.influence.sketches import Sketches, open_sketches
from gradstore.store.store import Store


@dataclass(frozen=True)
class Search:
    """A run's sketches beside the exposures they are of, (n,) each: opened once, asked often.

    It is of the store as it was when it was opened.
    """

    sketches: Sketches
    sample: NDArray[np.int64]
    epoch: NDArray[np.int64]
    weight: NDArray[np.float64]
    epochs: tuple[int, ...]

    def wanted(self, epochs: str) -> NDArray[np.bool_]:
        """Which exposures are asked for; of ``first`` each record's earliest."""
        if epochs == "first":
            earliest = np.full(self.sample.max(initial=0) + 1, np.iinfo(np.int64).max)
            np.minimum.at(earliest, self.sample, self.epoch)
            first: NDArray[np.bool_] = self.epoch == earliest[self.sample]
            return first
        schedule = Schedule.parse(epochs)
        asked = [epoch for epoch in self.epochs if schedule.wants(epoch, None)]
        if len(asked) == len(self.epochs):
            return np.ones(len(self.epoch), bool)
        return np.isin(self.epoch, asked)


def open_search(store: Store, run: Mapping[str, Any]) -> Search:
    """Raises :class:`InfluenceError` for sketches that are missing or stale."""
    sketches = open_sketches(store, run)
    columns = store.columns(
        """SELECT sample_id, epoch, learning_rate * batch_share * grad_scale AS weight
           FROM exposures WHERE run_id = ? ORDER BY segment_id, row_start""",
        [run["run_id"]],
    )
    sample, epoch = (columns[name].astype(np.int64) for name in ("sample_id", "epoch"))
    weight = columns["weight"].astype(np.float64)
    return Search(sketches, sample, epoch, weight, tuple(np.unique(epoch).tolist()))


def nominated(
    search: Search,
    queries: Sequence[Query],
    count: int,
    *,
    epochs: str = "all",
    cosine: bool = False,
) -> list[list[int]]:
    """For each query the numbers of the ``count`` records whose scores, by sketches, are highest.

    Scores are those of :class:`gradstore.influence.top.Settings`, with estimated products.
    """
    asked = [(query, *of) for query in queries for of in query.gradients.items()]
    if not asked:
        return [[] for _ in queries]
    vectors = torch.stack([search.sketches.projection.of(of) for *_, of in asked], dim=1)
    products = search.sketches.products(normalize(vectors, dim=0) if cosine else vectors)
    if not cosine:
        products *= search.sketches.lengths[:, None]
    weight = 1.0 if cosine else search.weight
    wanted, chosen = search.wanted(epochs), []
    for query in queries:
        scores, counted = np.zeros(len(wanted)), np.zeros(len(wanted), bool)
        for column, (of, epoch, _) in enumerate(asked):
            if of is query:
                rows = wanted if epoch is None else wanted & (search.epoch == epoch)
                np.multiply(products[:, column].numpy(), weight, out=scores, where=rows)
                counted |= rows
        chosen.append(_highest(search.sample, scores, counted, count, mean=cosine))
    return chosen


def _highest(
    sample: NDArray[np.int64],
    scores: NDArray[np.float64],
    counted: NDArray[np.bool_],
    count: int,
    *,
    mean: bool,
) -> list[int]:
    """The records with the highest sums over their exposures, or means, in no order."""
    totals, counts = np.bincount(sample, scores), np.bincount(sample, counted)
    present = np.flatnonzero(counts)
    values = totals[present] / (counts[present] if mean else 1)
    if count < len(present):
        present = present[np.argpartition(-values, count)[:count]]
    return [int(number) for number in present]
