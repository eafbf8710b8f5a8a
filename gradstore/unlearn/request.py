"""A request that changes a model: its beginnings, what it led to, its rows in the catalog."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from gradstore.identity import digest_checkpoint, identify
from gradstore.store import catalog
from gradstore.store.catalog import Columns
from gradstore.store.files import replace_durably, sync_tree, writing
from gradstore.store.lineage import forgotten_before, run_of
from gradstore.store.store import Store
from gradstore.training.ingest import check_new_checkpoint, save_checkpoint
from gradstore.training.model import load_model, tokenizer_of
from gradstore.unlearn import receipt
from gradstore.unlearn.dose import Point
from gradstore.unlearn.match import Thresholds, near_duplicates, record_matches
from gradstore.unlearn.target import Target
from gradstore.unlearn.unused import Tokens, tokens_of
from gradstore.unlearn.update import pack


@dataclass(frozen=True)
class Score:
    """A sample's loss (mean nats per token) before and after.

    ``forecast`` is what the path's start foretold. Of a sample to be forgotten, ``target`` is the
    loss if never trained on, known from ``low`` to ``high``, ``outcome`` its own verdict.
    """

    id: str
    role: str
    before: float
    after: float
    forecast: float | None = None
    target: float | None = None
    low: float | None = None
    high: float | None = None
    outcome: str | None = None

    @property
    def way(self) -> float | None:
        """How much of the way to its target the loss went."""
        if self.target is None or self.target == self.before:
            return None
        return (self.after - self.before) / (self.target - self.before)


@dataclass(frozen=True)
class Subject:
    """What a request is about: a checkpoint, the run it comes from, and samples it met.

    ``gone`` are the ids that earlier requests made the checkpoint forget, with the last such one.
    """

    store: Store
    model: Path
    digest: str
    network: Any
    tokenizer: Any
    run: dict[str, Any]
    samples: dict[str, int]
    gone: dict[str, int]
    notes: list[str]

    @classmethod
    def open(
        cls, store: Store, ids: Sequence[str], model: Path, out: Path, run: str | None
    ) -> Subject:
        """Load what ids and paths name.

        Raises :class:`IdError`, :class:`ModelError`, or :class:`ForgetError`.
        """
        check_new_checkpoint(out)
        samples = store.resolve(ids)
        network, tokenizer = load_model(model), tokenizer_of(model)
        store.model.check(identify(network, tokenizer), str(model))
        digest = digest_checkpoint(model) if model.is_dir() else str(model)
        found, notes = run_of(store, digest, run)
        gone = forgotten_before(store, digest)
        return cls(store, model, digest, network, tokenizer, found, samples, gone, notes)

    @cached_property
    def own_tokens(self) -> Tokens:
        """Those that only the samples contain, and those that nobody does; the run is read once."""
        gone = self.store.resolve(self.gone).values()
        return tokens_of(self.store, self.run, self.samples.values(), gone)

    def row(self, started: float, written: Path | None, digest: str | None) -> dict[str, Any]:
        """The columns of ``requests`` that every request has; ``started`` is monotonic time."""
        return {
            "run_id": self.run["run_id"],
            "model_in": str(self.model.resolve()) if self.model.is_dir() else str(self.model),
            "model_in_digest": self.digest,
            "model_out": None if written is None else str(written.resolve()),
            "model_out_digest": digest,
            "seconds": time.monotonic() - started,
        }


@dataclass(frozen=True)
class Outcome:
    """What a request did, or would do: the row of ``requests`` and what belongs to it."""

    request_id: int | None
    verdict: str
    reason: str
    run: str
    dose: float | None
    target: Target | None
    path: list[Point]
    scores: list[Score]
    out: Path | None
    notes: list[str]


def duplicates(
    store: Store,
    run: dict[str, Any],
    samples: dict[str, int],
    dry_run: bool,
    progress: Callable[[str], None],
) -> dict[str, int]:
    """Near-duplicates of the samples, shown before anything is done to them."""
    progress("looking for near-duplicates")
    matches = near_duplicates(store, list(samples), run=run["run_id"])
    for match in matches:
        progress(str(match))
    if not dry_run:
        record_matches(store, matches, Thresholds(), run["run_id"])
    found = store.resolve(match.id for match in matches)
    progress(f"near-duplicates added to the request: {len(found.keys() - samples.keys())}")
    return found


def write_checkpoint(network: Any, tokenizer: Any, out: Path) -> str:
    """Write the checkpoint beside its place, then rename it there."""
    temporary = out.parent / f".tmp-{out.name}-{os.getpid()}"
    try:
        digest = save_checkpoint(network, tokenizer, temporary)
        with writing(out):
            sync_tree(temporary)
            if out.exists():
                out.rmdir()
        replace_durably(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return digest


def record(
    store: Store,
    request: dict[str, Any],
    points: list[Point],
    chosen: Point | None,
    scores: list[tuple[int, Score]],
    tokens: Columns,
    written: Path | None,
    updates: Mapping[str, Tensor] | None,
) -> int:
    """Enter a request with its path, scores and receipt in one transaction; returns its number.

    If that fails, the checkpoint at ``written`` is removed: the same command will be run again.
    """
    try:
        packed = pack(updates) if written is not None and updates else None
        with store.transaction() as connection:
            [(number,)] = connection.execute(
                "SELECT coalesce(max(request_id), 0) + 1 FROM requests"
            ).fetchall()
            request = {"request_id": number, "created_at": catalog.now(), **request}
            catalog.insert(connection, "requests", {k: [v] for k, v in request.items()})
            path = {
                "request_id": [number] * len(points),
                "dose": [p.dose for p in points],
                "forget_loss": [p.forget for p in points],
                "retained_loss": [p.retained for p in points],
                "holdout_loss": [p.holdout for p in points],
                "worst_rise": [p.worst for p in points],
                "forecast_loss": [p.forecast for p in points],
                "chosen": [
                    written is not None and chosen is not None and p.dose == chosen.dose
                    for p in points
                ],
            }
            catalog.insert(connection, "paths", path)
            count = len(scores)
            table = {
                "request_id": [number] * count,
                "sample_id": [sample for sample, _ in scores],
                "role": [s.role for _, s in scores],
                "metric": ["loss"] * count,
                "before": [s.before for _, s in scores],
                "after": [None if written is None else s.after for _, s in scores],
                "forecast": [s.forecast for _, s in scores],
                "target": [s.target for _, s in scores],
                "outcome": [s.outcome for _, s in scores],
            }
            catalog.insert(connection, "scores", table)
            count = len(tokens["position"])
            catalog.insert(connection, "token_losses", {"request_id": [number] * count, **tokens})
            receipt.enter(store, connection, number)
            if written is not None:
                receipt.write(store, connection, number, packed)
    except BaseException:
        if written is not None:
            shutil.rmtree(written)
        raise
    return int(number)
