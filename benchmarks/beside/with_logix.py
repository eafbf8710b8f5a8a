"""logix: gradients of the blocks' linear maps in a random low rank (LoGra), whitened."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from beside.common import BATCH, Scores, Setting, batches, bytes_of, linearized, summed_loss


class LoGra:
    """As in its example for language models: attention and MLP, ``hessian`` raw, summed loss."""

    def __init__(self, setting: Setting, rank: int) -> None:
        self._setting, self._rank = setting, rank

    def build(self) -> None:
        """rank × rank numbers of a record and module, and their covariance."""
        from logix import LogIX, LogIXScheduler

        config = self._setting.folder / "config.yaml"
        lora = {"init": "random", "rank": self._rank}
        config.write_text(
            json.dumps({"root_dir": str(self._setting.folder / "logs"), "lora": lora})
        )
        self._network = linearized(self._setting.checkpoint)
        self._run = LogIX("peers", config=str(config))
        self._run.watch(self._network, name_filter=["att", "mlp"])
        self._run.add_lora()
        for _ in LogIXScheduler(self._run, lora="none", hessian="raw", save="grad"):
            for _ in self._logs(self._setting.records, "record"):
                pass  # they are on disk
            self._run.finalize()

    def _logs(self, samples: Sequence[Tensor], name: str) -> Iterator[Any]:
        for number, batch in enumerate(batches(samples)):
            ids = [f"{name}-{BATCH * number + row}" for row in range(len(batch["labels"]))]
            with self._run(data_id=ids, mask=batch["attention_mask"]):
                self._network.zero_grad()
                summed_loss(self._network, batch).backward()
            yield self._run.get_log(copy=name == "query")

    def gradients(self, queries: Sequence[Tensor]) -> Any:
        """In the same rank."""
        from logix.utils import merge_logs

        self._run.setup({"grad": ["log"]})
        self._run.eval()
        return merge_logs(list(self._logs(queries, "query")))

    def search(self, asked: Any) -> Scores:
        """Whitened queries times the stored gradients, which are read from disk each time."""
        loader = self._run.build_log_dataloader(batch_size=64)
        found = self._run.influence.compute_influence_all(asked, loader)
        order = [int(id.removeprefix("record-")) for id in found["tgt_ids"]]
        scores: Scores = found["influence"].T.double().numpy()
        out = scores.copy()
        out[order] = scores
        return out

    def sizes(self) -> tuple[int, int]:
        """Memory-mapped chunks and their metadata; the rest is curvature and weights."""
        logs = self._setting.folder / "logs"
        records = bytes_of(*logs.rglob("log_rank_*"))
        return records, bytes_of(logs) - records


METHODS = {f"logix, rank {rank}": partial(LoGra, rank=rank) for rank in (16, 64)}
