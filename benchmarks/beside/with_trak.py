"""TRAK: randomly projected gradients of all parameters, whitened."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beside.common import IGNORED, Batch, Scores, Setting, batches, bytes_of
from gradstore.training.model import load_model

AT_ONCE = 32  # its projector for the CPU draws the matrix again for every batch


class Projected:
    """One checkpoint; the output is the mean log-odds of a text's tokens, as for classifiers."""

    def __init__(self, setting: Setting, dimensions: int) -> None:
        self._setting, self._dimensions, self._asked = setting, dimensions, 0

    def build(self) -> None:
        """Per-sample gradients by vmap, float32 (its default of float16 is for GPUs)."""
        from trak import TRAKer
        from trak.projectors import BasicProjector, ProjectionType

        self.network = load_model(self._setting.checkpoint).eval()
        self.network.set_attn_implementation("eager")  # the others are not for vmap
        self.weights = {name: of.clone() for name, of in self.network.state_dict().items()}
        count = sum(parameter.numel() for parameter in self.network.parameters())
        # its default for the CPU, but in blocks: with one alone it fails when it is asked
        projector = BasicProjector(
            count, self._dimensions, 0, ProjectionType.normal, torch.device("cpu"), block_size=16
        )
        self.traker = TRAKer(
            self.network,
            task(),
            train_set_size=len(self._setting.records),
            save_dir=str(self._setting.folder / "trak"),
            device="cpu",
            projector=projector,
            use_half_precision=False,
            logging_level=logging.ERROR,
        )
        self.traker.load_checkpoint(self.weights, model_id=0)
        for batch in batches(self._setting.records, AT_ONCE):
            self.traker.featurize(batch=pair(batch), num_samples=len(batch["labels"]))
        self.traker.finalize_features()

    def gradients(self, queries: Sequence[Tensor]) -> str:
        """Projected alike, under a name."""
        self._asked += 1
        name = f"asked-{self._asked}"
        self.traker.start_scoring_checkpoint(name, self.weights, 0, num_targets=len(queries))
        for batch in batches(queries, AT_ONCE):
            self.traker.score(batch=pair(batch), num_samples=len(batch["labels"]))
        return name

    def search(self, asked: str) -> Scores:
        """Features times the queries' gradients times 1 − p."""
        return np.array(self.traker.finalize_scores(exp_name=asked), dtype=np.float64)

    def sizes(self) -> tuple[int, int]:
        """Gradients and features."""
        return bytes_of(self._setting.folder / "trak"), 0


def pair(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch["input_ids"], batch["labels"]


def task() -> Any:
    """Log-odds of the right tokens; made here, for its base class is the library's."""
    from trak.modelout_functions import AbstractModelOutput

    class Tokens(AbstractModelOutput):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        @staticmethod
        def get_output(
            network: Any, weights: Any, buffers: Any, ids: Tensor, labels: Tensor
        ) -> Tensor:
            given = (ids[None],)
            logits = torch.func.functional_call(network, (weights, buffers), given).logits[0, :-1]
            right, counts = right_tokens(logits, labels)
            rest = logits.scatter(1, labels[1:].clamp(min=0)[:, None], -torch.inf).logsumexp(-1)
            output: Tensor = ((right - rest) * counts).sum() / counts.sum()
            return output

        def get_out_to_loss_grad(
            self, network: Any, weights: Any, buffers: Any, batch: tuple[Tensor, Tensor]
        ) -> Tensor:
            logits = torch.func.functional_call(network, (weights, buffers), batch[0]).logits
            found = []
            for row, labels in zip(logits[:, :-1].detach(), batch[1], strict=True):
                right, counts = right_tokens(row.log_softmax(-1), labels)
                found.append(((1 - right.exp()) * counts).sum() / counts.sum())
            return torch.stack(found)[:, None]

    return Tokens()


def right_tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logit of each next token, and whether it counts."""
    after = labels[1:]
    return logits.gather(1, after.clamp(min=0)[:, None])[:, 0], (after != IGNORED).float()


METHODS = {f"TRAK, {d} dimensions": partial(Projected, dimensions=d) for d in (64, 2048)}
