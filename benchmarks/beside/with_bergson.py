"""bergson: gradients of the blocks' linear maps, whole or projected, and curvature of them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beside.common import Scores, Setting, bytes_of


def configured(setting: Setting, name: str, samples: Path, projection: int) -> Any:
    """The settings of a step: those of the library, but for what they are to be done to."""
    from bergson import DataConfig, IndexConfig
    from bergson.config.config import DistributedConfig

    return IndexConfig(
        run_path=str(setting.folder / name),
        model=str(setting.checkpoint),
        data=DataConfig(dataset=str(samples)),
        projection_dim=projection,
        token_batch_size=128,
        overwrite=True,
        distributed=DistributedConfig(nproc_per_node=1),
    )


def saved(setting: Setting, name: str, samples: Sequence[Tensor]) -> Path:
    """Token ids as a dataset that is not tokenized again."""
    from datasets import Dataset

    rows = [tokens.tolist() for tokens in samples]
    columns = {"input_ids": rows, "length": [len(row) for row in rows]}
    path = setting.folder / name
    shutil.rmtree(path, ignore_errors=True)
    Dataset.from_dict(columns).save_to_disk(str(path))
    return path


class Index:
    """``build`` and ``query``: dot products with stored gradients, held in memory from then on."""

    def __init__(self, setting: Setting, projection: int) -> None:
        self._setting, self._projection = setting, projection
        self._opened: Any = None

    def build(self) -> None:
        """Each record's gradient of each module: out × in numbers, or ``projection`` squared."""
        self._index("index", saved(self._setting, "records", self._setting.records))

    def _index(self, name: str, samples: Path) -> Any:
        from bergson import PreprocessConfig
        from bergson.build import build
        from bergson.utils.worker_utils import validate_run_path

        config = configured(self._setting, name, samples, self._projection)
        validate_run_path(config)
        build(config, PreprocessConfig())
        return config

    def gradients(self, queries: Sequence[Tensor]) -> dict[str, Tensor]:
        """By module, projected alike."""
        from bergson import load_module_gradients

        config = self._index("asked", saved(self._setting, "queries", queries))
        found = load_module_gradients(Path(config.run_path))
        return {name: torch.tensor(np.array(found[name])) for name in found}

    def search(self, asked: dict[str, Tensor]) -> Scores:
        """All records' scores, sorted by the library and put in order again."""
        from bergson import Attributor

        if self._opened is None:
            self._opened = Attributor(self._setting.folder / "index")
        values, rows = self._opened.search(asked, k=None)
        scores: Scores = values.gather(1, rows.argsort(1)).T.double().numpy()
        return scores

    def sizes(self) -> tuple[int, int]:
        """Gradients alone; the copy of the data beside them is small."""
        index = self._setting.folder / "index"
        records = bytes_of(index / "gradients.bin")
        return records, bytes_of(index) - records


class Recipe:
    """``trackstar``, normalized as in its paper, or ``ekfac``; nothing is kept of a record."""

    def __init__(self, setting: Setting, name: str) -> None:
        self._setting, self._name = setting, name

    def build(self) -> None:
        """Nothing: the recipes fit their curvature when they are asked."""
        self._records = saved(self._setting, "records", self._setting.records)

    def gradients(self, queries: Sequence[Tensor]) -> Path:
        """The queries as a dataset."""
        return saved(self._setting, "queries", queries)

    def search(self, asked: Path) -> Scores:
        """The whole recipe, else at its defaults; scores of each query by itself."""
        from bergson import PreprocessConfig, QuerySetConfig, ScoreConfig
        from bergson.cli.trackstar import trackstar
        from bergson.config.config import HessianConfig, HessianPipelineConfig, TrackstarConfig
        from bergson.data import load_scores
        from bergson.hessians.pipeline import hessian_pipeline

        query = QuerySetConfig(dataset=str(asked))
        if self._name == "trackstar":
            config = configured(self._setting, self._name, self._records, 16)
            whitened = PreprocessConfig(unit_normalize=True)
            trackstar(config, TrackstarConfig(query=query, preprocess_cfg=whitened))
        else:
            config = configured(self._setting, self._name, self._records, 0)
            hessian_pipeline(
                config, HessianConfig(method="kfac", ev_correction=True), ScoreConfig(),
                PreprocessConfig(), HessianPipelineConfig(query=query),
            )  # fmt: skip
        return np.array(load_scores(Path(config.run_path) / "scores")[:], dtype=np.float64)

    def sizes(self) -> tuple[int, int]:
        """Curvature, queries and scores."""
        return 0, bytes_of(self._setting.folder / self._name)


METHODS = {
    "bergson, exact": partial(Index, projection=0),
    "bergson, 16 × 16": partial(Index, projection=16),
    "bergson, TrackStar": partial(Recipe, name="trackstar"),
    "bergson, EK-FAC": partial(Recipe, name="ekfac"),
}
