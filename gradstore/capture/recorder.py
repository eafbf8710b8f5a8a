"""The life of a capture: a run begins, exposures are recorded step by step, the run ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradstore.capture.assemble import Moment, records_of
from gradstore.capture.clipping import ClippingProbe
from gradstore.capture.layers import OF_TOKENS, describe, linear_layers, some_of
from gradstore.capture.measure import measure_head
from gradstore.capture.moments import group_of, second_moments
from gradstore.capture.schedule import Schedule
from gradstore.capture.taps import ID_ARGUMENT, Pass, Taps, embedding_of, head_of, position_of
from gradstore.errors import CaptureError
from gradstore.identity import digest_folder, identify
from gradstore.store import catalog
from gradstore.store.catalog import Columns
from gradstore.store.erasures import Refused
from gradstore.store.record import Record
from gradstore.store.store import Store
from gradstore.store.writer import SegmentWriter

TOP_K = 64
ERROR_EVERY = 64  # micro-batches between measurements of the relative error, which cost two GEMMs
SIDES = ("auto", "input", "both")
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Recorder:
    """Turns the passes of a training into records and hands them to the store's writer.

    :func:`gradstore.capture` and :class:`gradstore.GradStoreCallback` make one. ``epoch`` is the
    current epoch, from 1; ``step`` counts optimizer steps. Exposures of a step become records when
    the optimizer takes it: what was never applied is never kept. ``layers`` names linear layers
    to capture besides the embedding: see :func:`gradstore.capture.layers.linear_layers`.
    """

    def __init__(
        self,
        model: nn.Module,
        store: Store,
        optimizer: torch.optim.Optimizer,
        *,
        run: str | None = None,
        resume: bool = False,
        epochs_captured: str = "first",
        sides: str = "auto",
        top_k: int = TOP_K,
        layers: str | Sequence[str] = (),
        tokenizer: Any = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if sides not in SIDES:
            raise ValueError(f"sides is one of {', '.join(SIDES)}, not {sides!r}")
        self.epoch, self.store = 1, store
        self._schedule = Schedule.parse(epochs_captured)
        modules = linear_layers(model, layers)
        self._layers = describe(modules)
        self._identity = identify(model, tokenizer)
        store.bind(self._identity, type(model).__name__)
        self._both = sides == "both" or (sides == "auto" and self._identity.tied)
        self._top_k = top_k if self._both else None
        self._optimizer = getattr(optimizer, "optimizer", optimizer)  # as accelerate wraps it
        self._weights: dict[str, Any] = {"embedding": embedding_of(model).weight}
        if (position := position_of(model)) is not None:
            self._weights["position"] = position[0].weight
        if self._both and not self._identity.tied:
            self._weights["head"] = head_of(model).weight
        self._group = group_of(self._optimizer, self._weights["embedding"])
        for name, module in modules.items():
            for kind, weight in module.named_parameters(recurse=False):
                self._weights[f"{name}.{kind}"] = weight
                own = group_of(self._optimizer, weight, f"{name}.{kind}")
                if _base_rate(own) != _base_rate(self._group):
                    raise CaptureError(
                        f"{name}.{kind} has another learning rate than the embedding, and a run "
                        "keeps one a step; give both the same, or leave the layer out"
                    )
        self._position_offset = None if position is None else position[1]
        distributed = dist.is_available() and dist.is_initialized()
        self._world = dist.get_world_size() if distributed else 1
        self._rank = dist.get_rank() if distributed else 0
        self._writer = SegmentWriter(
            store, lambda: self._run_of_all_ranks(run, resume, settings or {}), self._rank
        )
        self.run = self._writer.run
        self.step = self.run.get("steps") or self._last_step()
        self._seen, self._refused = self._kept_before(), Refused.of(store)
        kept = store.moments(self.run["run_id"], "embedding", "first-epoch")
        self._first_epoch_over = kept is not None
        self._waiting: list[Record] = []
        self._steps: list[dict[str, Any]] = []
        self._passes, self._exposures = 0, sum(len(epochs) for epochs in self._seen.values())
        self._clipping = ClippingProbe(model, distributed)
        if self._layers and self._rank == 0 and not store.layers(self.run["run_id"]):
            facts = [asdict(layer) for layer in self._layers]
            table = {name: [each[name] for each in facts] for name in facts[0]}
            self._writer.put_state("layers", {}, {"layers": table})
        if not self._exposures and self._rank == 0:
            self._save_start()
        self._taps = Taps(model, self._on_head, self._on_embedding, modules)
        self._handle = self._optimizer.register_step_pre_hook(self._on_step)

    # -- what a training loop calls ------------------------------------------------------------

    def epochs(self, count: int) -> Iterator[int]:
        """Iterate over epochs 1 … ``count``, telling the recorder where training is."""
        for self.epoch in range(1, count + 1):
            yield self.epoch
            self.end_epoch()

    def end_epoch(self) -> None:
        """Keep the optimizer's second moments after the first epoch; make the epoch durable."""
        if not self._first_epoch_over:
            self._first_epoch_over = self._save_moments("first-epoch")
        self.flush()

    def flush(self) -> None:
        """Wait until everything captured so far is durable and visible."""
        self._put_steps()
        self._writer.flush()
        if self._world > 1:
            dist.barrier()  # rank 0 commits what the other ranks have made durable by now
            if self._rank == 0:
                self._writer.flush()

    def add_checkpoint(self, folder: Path) -> None:
        """Note a checkpoint that training has saved, from which an exact replay can go on."""
        place = {"run_id": self.run["run_id"], "step": self.step}
        facts = place | {"path": str(folder.resolve()), "digest": digest_folder(folder)}
        with self.store.transaction() as connection:
            connection.execute(
                "DELETE FROM checkpoints WHERE run_id = ? AND step = ?", list(place.values())
            )
            catalog.insert(connection, "checkpoints", {name: [x] for name, x in facts.items()})

    def add_holdout(self, tokens: Mapping[str, Tensor]) -> None:
        """Keep held-out samples' token ids, so that later requests can measure on them."""
        if self._rank != 0:
            return
        self._refused.check(tokens)
        ids = list(tokens)
        lengths = [len(tokens[i]) for i in ids]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        table: Columns = {"id": ids, "token_start": starts, "tokens": lengths}
        arrays = {"tokens": torch.cat([tokens[i].to(torch.int32) for i in ids])}
        self._writer.put_state("holdout", arrays, {"holdout": table})

    def add_order(self, ids: Sequence[str]) -> None:
        """Keep the order of the training data, by the ids' hashes: samples get numbers later."""
        if self._rank == 0:
            hashes = np.array([catalog.hash_of(i) for i in ids], np.uint64).view(np.int64)
            self._writer.put_state("order", {"order": torch.from_numpy(hashes)}, {})

    def add_holdout_losses(self, losses: Mapping[str, float], epoch: int) -> None:
        """Record held-out losses (mean nats per token) after ``epoch`` epochs (0: before any)."""
        if self._rank != 0:
            return
        count = len(losses)
        table: Columns = {
            "id": list(losses),
            "epoch": [epoch] * count,
            "step": [self.step] * count,
            "loss": list(losses.values()),
        }
        self._writer.put_state("holdout", {}, {"holdout_losses": table})

    def finish(self) -> None:
        """End the run: final moments, everything durable and visible, the run marked finished."""
        self._detach()
        if not self._exposures:
            self.abort()
            raise CaptureError(
                "training ended and nothing was captured: no optimizer step was taken in the "
                f"epochs asked for (epochs_captured={self._schedule.text!r})"
            )
        self._save_moments("end")
        self.flush()
        self._writer.close()
        if self._rank == 0:
            self.store.update_run(self.run["run_id"], status="finished", steps=self.step)

    def abort(self) -> None:
        """End a run that failed: what was captured and applied stays, the run is marked failed."""
        self._detach()
        try:
            try:
                self._put_steps()
            finally:
                self._writer.close()
        finally:
            if self._rank == 0:
                self.store.update_run(self.run["run_id"], status="failed", steps=self.step)

    # -- what the hooks call -------------------------------------------------------------------

    def _on_head(self, one: Pass, gradient: Tensor) -> None:
        if not any(map(self._wanted, one.ids)):
            one.wanted = False
            return
        keep_exact = self._passes % ERROR_EVERY == 0 and (self._both or self._identity.tied)
        one.facts = measure_head(one, gradient, self._top_k, keep_exact)
        one.logits = one.logits_gradient = None  # a kept reference is a leak

    def _on_embedding(self, one: Pass, gradient: Tensor) -> None:
        if not one.wanted:
            self._passes += 1
            return
        if one.facts is None:
            raise CaptureError("a backward pass reached the embedding but not the model's head")
        self._passes += 1
        moment = Moment(
            self.epoch,
            self.step + 1,
            float(self._group["lr"]),
            self._world,
            self._identity.tied,
            _DTYPES[self.store.format.dtype],
            self._position_offset,
            self._layers,
        )
        for record in records_of(one, one.facts, gradient, moment, self._wanted):
            self._refused.check({record.exposure.id: record.tokens})
            self._seen.setdefault(record.exposure.id, set()).add(self.epoch)
            self._waiting.append(record)

    def _on_step(self, *_: Any) -> None:
        if not self._passes:
            raise CaptureError(
                "an optimizer step came and no gradient had arrived: pass the samples' ids to the "
                f"model as `{ID_ARGUMENT}=...` (a Trainer's collator: gradstore.IdCollator), and "
                "start capturing before the model is compiled"
            )
        scale = self._clipping.applied()
        self.step += 1
        rate = float(self._group["lr"])
        taken = {"step": self.step, "epoch": self.epoch, "learning_rate": rate, "grad_scale": scale}
        self._steps.append(taken)
        self._exposures += len(self._waiting)
        self._writer.put(
            [replace(r, exposure=replace(r.exposure, grad_scale=scale)) for r in self._waiting]
        )
        self._waiting = []

    # -- inside ----------------------------------------------------------------------------------

    def _wanted(self, sample: str) -> bool:
        return self._schedule.wants(self.epoch, self._seen.get(sample))

    def _run_of_all_ranks(
        self, name: str | None, resume: bool, settings: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """The run to go on with, or one that rank 0 begins for all."""
        self.store.refresh()  # until the rank's lock was held, others could erase
        box: list[Any] = [None]
        if self._rank == 0:
            box = [self._resume_run(name) if resume else self._begin_run(name, settings)]
        if self._world > 1:
            dist.broadcast_object_list(box)
        run: Mapping[str, Any] = box[0]
        return run

    def _resume_run(self, name: str | None) -> dict[str, Any]:
        run = self.store.run(name)
        kept = self.store.layers(run["run_id"])
        if kept != self._layers and (kept or self._begun(run)):
            names = ",".join(layer.layer for layer in kept)
            raise CaptureError(
                f"{run['name']} captured other layers ({some_of([k.layer for k in kept])}); go on "
                + (f"with layers={names!r}" if kept else "without layers")
            )
        self.store.update_run(run["run_id"], status="running", finished_at=None)
        return run

    def _begin_run(self, name: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
        betas, epsilon = self._group.get("betas", (None, None)), self._group.get("eps")
        return self.store.begin_run(
            {
                "name": name,
                "epochs_captured": self._schedule.text,
                "sides": "both" if self._both else "input",
                "top_k": self._top_k or 0,
                "optimizer": type(self._optimizer).__name__,
                "beta1": betas[0],
                "beta2": betas[1],
                "epsilon": epsilon if isinstance(epsilon, float) else None,  # Adafactor has two
                "weight_decay": self._group.get("weight_decay"),
                "settings": catalog.as_json(settings),
            }
        )

    def _begun(self, run: Mapping[str, Any]) -> bool:
        found = self.store.rows("SELECT 1 FROM exposures WHERE run_id = ? LIMIT 1", [run["run_id"]])
        return bool(found)

    def _last_step(self) -> int:
        """The last step a run is known to have taken, for one that was killed."""
        [(last,)] = self.store.rows(
            """SELECT greatest((SELECT max(step) FROM steps WHERE run_id = $1),
                               (SELECT max(step) FROM exposures WHERE run_id = $1))""",
            [self.run["run_id"]],
        )
        return last or 0

    def _kept_before(self) -> dict[str, set[int]]:
        kept: dict[str, set[int]] = {}
        for sample, epoch in self.store.rows(
            "SELECT id, epoch FROM exposures JOIN samples USING (sample_id) WHERE run_id = ?",
            [self.run["run_id"]],
        ):
            kept.setdefault(sample, set()).add(epoch)
        return kept

    def _put_steps(self) -> None:
        taken, self._steps = self._steps, []
        if taken and self._rank == 0:
            table: Columns = {name: [step[name] for step in taken] for name in taken[0]}
            self._writer.put_state("moments", {}, {"steps": table})

    def _save_start(self) -> None:
        """Keep the weights whose rows are tokens', as they are before the first step."""
        rows = {name: self._weights[name] for name in OF_TOKENS if name in self._weights}
        self._put_moments({n: w.detach().float().cpu().clone() for n, w in rows.items()}, "start")

    def _save_moments(self, moment: str) -> bool:
        kept = second_moments(self._optimizer, self._weights)
        if kept and self._rank == 0:
            self._put_moments(kept, moment)
        return True

    def _put_moments(self, kept: dict[str, Tensor], moment: str) -> None:
        count = len(kept)
        table: Columns = {
            "layer": list(kept),
            "moment": [moment] * count,
            "step": [self.step] * count,
        }
        self._writer.put_state("moments", kept, {"moments": table})

    def _detach(self) -> None:
        self._taps.remove()
        self._clipping.remove()
        self._handle.remove()


def _base_rate(group: Mapping[str, Any]) -> Any:
    """A group's learning rate before any schedule: in warm-up all may stand at nought."""
    return group.get("initial_lr", group["lr"])
