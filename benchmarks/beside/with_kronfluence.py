"""kronfluence: exact gradients of the blocks' linear maps, taken again for every question."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from beside.common import BATCH, IGNORED, Batch, Scores, Setting, bytes_of, linearized, rows


class Pairwise:
    """``identity`` (dot products) or ``ekfac``, whose damping is 1e-8 unless told otherwise."""

    def __init__(self, setting: Setting, strategy: str, damping: float | None) -> None:
        self._setting, self._strategy, self._damping = setting, strategy, damping

    def build(self) -> None:
        """Covariances, their eigenvectors, eigenvalues: three passes; none for ``identity``."""
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments

        network = linearized(self._setting.checkpoint)
        about = task([n for n, m in network.named_modules() if is_inner(n, m)])
        self._analyzer = Analyzer(
            "peers",
            prepare_model(network, about),
            about,
            cpu=True,
            disable_tqdm=True,
            output_dir=str(self._setting.folder),
        )
        self._records = rows(self._setting.records)
        self._analyzer.fit_all_factors(
            factors_name="factors",
            dataset=self._records,
            per_device_batch_size=BATCH,
            factor_args=FactorArguments(strategy=self._strategy),
            overwrite_output_dir=True,
        )

    def gradients(self, queries: Sequence[Tensor]) -> list[Batch]:
        """The queries themselves: their gradients are taken with the others'."""
        return rows(queries)

    def search(self, asked: list[Batch]) -> Scores:
        """Gradients of queries and records, and their products."""
        from kronfluence.arguments import ScoreArguments

        self._analyzer.compute_pairwise_scores(
            scores_name="scores",
            factors_name="factors",
            query_dataset=asked,
            train_dataset=self._records,
            per_device_query_batch_size=len(asked),
            per_device_train_batch_size=BATCH,
            score_args=ScoreArguments(damping_factor=self._damping),
            overwrite_output_dir=True,
        )
        found: Tensor = self._analyzer.load_pairwise_scores("scores")["all_modules"]
        return found.T.double().numpy()

    def sizes(self) -> tuple[int, int]:
        """Factors."""
        return 0, bytes_of(self._setting.folder)


def is_inner(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def task(modules: list[str]) -> Any:
    """Summed losses; made here, for its base class is the library's."""
    from kronfluence.task import Task

    class Texts(Task):  # type: ignore[misc]
        def compute_train_loss(
            self, batch: Batch, model: nn.Module, sample: bool = False
        ) -> Tensor:
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            if sample:
                drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
                labels = torch.where(labels == IGNORED, IGNORED, drawn)
            return cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="sum")

        def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return modules

        def get_attention_mask(self, batch: Batch) -> Tensor:
            return batch["attention_mask"]

    return Texts()


METHODS = {
    "kronfluence, identity": partial(Pairwise, strategy="identity", damping=None),
    "kronfluence, EK-FAC": partial(Pairwise, strategy="ekfac", damping=1e-8),
    "kronfluence, EK-FAC, damped": partial(Pairwise, strategy="ekfac", damping=None),
}
