"""Whom to score exactly: the records whose scores, estimated by sketches, are the highest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from gradstore.capture.schedule import Schedule
from gradstore.influence.axes import Reduced, reduced
from gradstore.influence.exposed import WEIGHT, Exposed
from gradstore.influence.query import Query
from gradstore.influence.rows import Place
from gradstore.influence.sketches import Sketches, open_sketches
from gradstore.store.store import Store

_LEADING = 8  # times as many as are nominated, judged by whole sketches
Rows = slice | NDArray[np.int64]


@dataclass(frozen=True)
class Search:
    """A run's sketches beside the exposures they are of, (n,) each: opened once, asked often.

    ``place`` (n, 4) has the columns of :class:`Place`, with -1 for none. Some 60 bytes an exposure
    are held, beside sketches that are ``reduced``. It is of the store as it was when it was opened.
    """

    sketches: Sketches
    reduced: Reduced | None
    sample: NDArray[np.int64]
    epoch: NDArray[np.int64]
    segment: NDArray[np.int64]
    weight: NDArray[np.float64]
    place: NDArray[np.int64]
    epochs: tuple[int, ...]

    def wanted(self, epochs: str) -> NDArray[np.bool_]:
        """Which exposures are asked for; of ``first`` each record's earliest."""
        if epochs == "first":
            earliest = np.full(self.sample.max(initial=0) + 1, np.iinfo(np.int64).max)
            np.minimum.at(earliest, self.sample, self.epoch)
            first: NDArray[np.bool_] = self.epoch == earliest[self.sample]
            return first
        schedule = Schedule.parse(epochs)
        return self._of_epochs([epoch for epoch in self.epochs if schedule.wants(epoch, None)])

    def rows_of(self, samples: Sequence[int]) -> NDArray[np.int64]:
        """Where the exposures of some samples are."""
        among = np.zeros(self.sample.max(initial=0) + 1, bool)
        among[samples] = True
        return np.flatnonzero(among[self.sample])

    def exposed(self, samples: Sequence[int], epochs: str, query: Query) -> list[Exposed]:
        """Exposures of some samples, of epochs asked for that the query has a gradient of."""
        rows, known = self.rows_of(samples), [e for e in self.epochs if query.at(e) is not None]
        rows = rows[(self.wanted(epochs) & self._of_epochs(known))[rows]]
        columns = (self.sample, self.epoch, self.segment, self.weight, self.place)
        found = []
        for sample, epoch, segment, weight, where in zip(
            *(column[rows].tolist() for column in columns), strict=True
        ):
            start, count, tokens, tail = where
            place = Place(start, count, tokens, None if tail < 0 else tail)
            found.append(Exposed(sample, epoch, segment, weight, place))
        return found

    def _of_epochs(self, epochs: Sequence[int]) -> NDArray[np.bool_]:
        if len(epochs) == len(self.epochs):
            return np.ones(len(self.epoch), bool)
        return np.isin(self.epoch, epochs)

    @cached_property
    def scale(self) -> NDArray[np.float64]:
        """What the product of a sketch of length 1 counts in the score."""
        scale: NDArray[np.float64] = self.weight * self.sketches.lengths.numpy()
        return scale


def open_search(store: Store, run: Mapping[str, Any], *, often: bool = False) -> Search:
    """Open a run's sketches; to be asked ``often``, they are reduced first, which reads them all.

    Raises :class:`InfluenceError` for sketches that are missing or stale.
    """
    sketches = open_sketches(store, run)
    columns = store.columns(
        f"""SELECT sample_id, epoch, segment_id, {WEIGHT} AS weight,
                  row_start, "rows", token_start, coalesce(tail_row, -1) AS tail_row
           FROM exposures WHERE run_id = ? ORDER BY segment_id, row_start""",
        [run["run_id"]],
    )
    names = ("sample_id", "epoch", "segment_id")
    sample, epoch, segment = (columns[name].astype(np.int64) for name in names)
    place = np.stack([columns[name].astype(np.int64) for name in Place._fields], axis=1)
    weight, epochs = columns["weight"].astype(np.float64), tuple(np.unique(epoch).tolist())
    shorter = reduced(sketches) if often else None
    return Search(sketches, shorter, sample, epoch, segment, weight, place, epochs)


def nominated(
    search: Search,
    queries: Sequence[Query],
    count: int,
    *,
    epochs: str = "all",
    cosine: bool = False,
) -> list[list[int]]:
    """For each query the numbers of the ``count`` records whose scores, by sketches, are highest.

    Scores are those of :class:`gradstore.influence.top.Settings`, with estimated products; where
    sketches are reduced, whole ones are read of those who lead by these.
    """
    asked = [(query, *of) for query in queries for of in query.gradients.items()]
    if not asked:
        return [[] for _ in queries]
    sketches, wanted, chosen = search.sketches, search.wanted(epochs), []
    vectors = torch.stack([sketches.projection.of(of) for *_, of in asked], dim=1)
    if cosine:
        vectors = normalize(vectors, dim=0)
    estimates = (search.reduced or sketches).products(vectors)
    for query in queries:
        columns = [n for n, (of, *_) in enumerate(asked) if of is query]
        scoring = _Scoring(search, wanted, [asked[n][1] for n in columns], cosine)
        among = count if search.reduced is None else _LEADING * count
        best = scoring.highest(slice(None), estimates[:, columns], among)
        if search.reduced is not None:
            rows = search.rows_of(best)
            best = scoring.highest(rows, sketches.some(rows) @ vectors[:, columns], count)
        chosen.append(best)
    return chosen


@dataclass(frozen=True)
class _Scoring:
    """What a query's products with exposures make of records.

    ``epochs`` are those of its gradients, one for each column of products, or None for every epoch.
    """

    search: Search
    wanted: NDArray[np.bool_]
    epochs: Sequence[int | None]
    cosine: bool

    def highest(self, rows: Rows, products: Float[Tensor, "r c"], count: int) -> list[int]:
        """The records with the highest sums over their exposures in ``rows``, in no order.

        For cosines the highest means.
        """
        sample, epoch, wanted = self.search.sample[rows], self.search.epoch[rows], self.wanted[rows]
        weight = 1.0 if self.cosine else self.search.scale[rows]
        scores, counted = np.zeros(len(sample)), np.zeros(len(sample), bool)
        for column, of in zip(products.T.numpy(), self.epochs, strict=True):
            here = wanted if of is None else wanted & (epoch == of)
            np.multiply(column, weight, out=scores, where=here)
            counted |= here
        totals = np.bincount(sample, scores)
        counts = np.bincount(sample if counted.all() else sample[counted], minlength=len(totals))
        if self.cosine:
            totals = totals / counts.clip(min=1)
        totals[counts == 0] = -np.inf
        most = min(count, int(np.count_nonzero(counts)))
        found = torch.from_numpy(totals).float().topk(most, sorted=False)
        best: list[int] = found.indices.tolist()
        return best
