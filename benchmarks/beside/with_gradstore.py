"""gradstore: gradients of the token embedding, captured while training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import gradstore
from beside.common import BATCH, Scores, Setting, bytes_of, epoch
from gradstore import Store
from gradstore.influence.query import Checkpoint, Query
from gradstore.influence.sketches import sketch
from gradstore.influence.top import Settings, influences
from gradstore.training.model import load_model


class Captured:
    """Both sides of the tied embedding, first epoch, in the default profile; scored by ``dot``."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def build(self) -> None:
        """An epoch of training with capture: the only one of these that moves the weights."""
        self.store = Store.create(self._setting.folder / "store")
        network = load_model(self._setting.checkpoint)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        ids = [str(number) for number in range(len(self._setting.records))]
        named = [ids[start : start + BATCH] for start in range(0, len(ids), BATCH)]
        with gradstore.capture(network, self.store, optimizer):
            epoch(network, optimizer, self._setting.records, sample_ids=named)
        self._checkpoint = Checkpoint(self.store, self._setting.checkpoint)
        self._numbers = list(self.store.resolve(ids).values())

    def gradients(self, queries: Sequence[Tensor]) -> list[Query]:
        """Exact and factored."""
        return [self._checkpoint.of_tokens(tokens) for tokens in queries]

    def search(self, asked: list[Query]) -> Scores:
        """Every stored gradient, read from disk each time."""
        return self._scores(asked, Settings("dot"))

    def _scores(self, asked: list[Query], settings: Settings) -> Scores:
        found = influences(self.store, asked, settings)
        by_number = [dict(zip(s.sample_ids, s.values, strict=True)) for s in found]
        rows = [[scores.get(number, -np.inf) for scores in by_number] for number in self._numbers]
        return np.array(rows, dtype=np.float64)

    def sizes(self) -> tuple[int, int]:
        """Catalog and sketches count as the records', Adam's moments and copies do not."""
        moments = self.store.stats()["moment_bytes"]
        root = self._setting.folder / "store"
        kept = (root / "segments", root / "sketches", root / "catalog.duckdb")
        records = bytes_of(*kept) - moments
        return records, bytes_of(root) - records


class Sketched(Captured):
    """The ten records whose sketches of 1,024 numbers come first, scored exactly."""

    def build(self) -> None:
        """The sketches are made afterwards, from what is stored."""
        super().build()
        sketch(self.store, size=1024)

    def search(self, asked: list[Query]) -> Scores:
        """Those that are not nominated are −∞."""
        return self._scores(asked, Settings("dot", coarse=10))


METHODS = {"gradstore": Captured, "gradstore, sketches": Sketched}
