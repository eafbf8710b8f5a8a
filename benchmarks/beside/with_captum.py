"""captum: TracInCP, gradients of all parameters taken again for every question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from beside.common import BATCH, IGNORED, Batch, Scores, Setting, batches, rows
from gradstore.training.model import load_model


class TracIn:
    """One checkpoint, the last."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def build(self) -> None:
        """Nothing is stored."""
        from captum.influence import TracInCP

        class Logits(nn.Module):
            def __init__(self, network: nn.Module) -> None:
                super().__init__()
                self.network = network

            def forward(self, ids: Tensor) -> Tensor:
                logits: Tensor = self.network(input_ids=ids).logits[:, :-1]
                return logits

        self._tracin = TracInCP(
            Logits(load_model(self._setting.checkpoint).eval()),
            [pair(row) for row in rows(self._setting.records)],
            checkpoints=["the last"],
            checkpoints_load_func=lambda model, _: 1.0,
            loss_fn=of_samples,
            batch_size=BATCH,
        )

    def gradients(self, queries: Sequence[Tensor]) -> Any:
        """The queries themselves."""
        return queries

    def search(self, asked: Sequence[Tensor]) -> Scores:
        """Gradients of queries and records, and their products."""
        [batch] = batches(asked, len(asked))
        found: Tensor = self._tracin.influence(pair(batch))
        return found.T.double().numpy()

    def sizes(self) -> tuple[int, int]:
        """Nothing."""
        return 0, 0


def pair(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch["input_ids"], batch["labels"][..., 1:]


def of_samples(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over tokens, one for each sample."""
    return cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none").sum(1)


METHODS = {"captum, TracInCP": TracIn}
