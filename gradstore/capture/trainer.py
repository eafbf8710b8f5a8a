"""Capturing inside ``transformers.Trainer``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gradstore.capture.recorder import Recorder
from gradstore.errors import CaptureError
from gradstore.evaluate.loss import sample_losses
from gradstore.store.store import Store


class GradStoreCallback(TrainerCallback):
    """Write every sample's gradient into ``store`` while a ``Trainer`` trains.

    The training data needs an id column and the collator an :class:`IdCollator` around it::

        with GradStoreCallback("store") as callback:
            Trainer(model, args, data_collator=IdCollator(collator), callbacks=[callback],
                    train_dataset=data).train()

    Leaving the ``with`` block ends a run that failed, keeping what was captured. ``holdout`` maps
    ids of samples that are not trained on to their token ids: their losses are recorded before
    training and after each epoch. ``order`` is that of the training data's ids, which an exact
    replay needs. The other options are :class:`Recorder`'s.
    """

    def __init__(
        self,
        store: Store | str | Path,
        *,
        holdout: Mapping[str, Tensor] | None = None,
        order: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.store = Store.open_or_create(store)
        self._holdout, self._order, self._options = holdout or {}, order, options
        self.recorder: Recorder | None = None
        self.run: Mapping[str, Any] | None = None

    def __enter__(self) -> GradStoreCallback:
        return self

    def __exit__(self, *_: object) -> None:
        self._abort()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a run, or go on with the newest when the trainer resumes from a checkpoint."""
        self._abort()  # with auto_find_batch_size training begins again
        if args.remove_unused_columns:
            raise CaptureError(
                "the Trainer drops the id column: set "
                "TrainingArguments(remove_unused_columns=False)"
            )
        if args.n_gpu > 1:
            raise CaptureError(
                "several GPUs in one process cannot be captured; start with torchrun, or set "
                "CUDA_VISIBLE_DEVICES to one"
            )
        resume, model = state.global_step > 0, kwargs["model"]
        options = {"tokenizer": kwargs.get("processing_class"), **self._options}
        if resume:
            options["run"] = self._run_of_checkpoint(args, state) or options.get("run")
        self.recorder = Recorder(model, self.store, kwargs["optimizer"], resume=resume, **options)
        self.run = self.recorder.run
        self.recorder.step = state.global_step
        if self._order and not resume:
            self.recorder.add_order(self._order)
        if self._holdout and not resume:
            self.recorder.add_holdout(self._holdout)
            self._measure_holdout(model, 0)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note which epoch the coming passes belong to."""
        if self.recorder is not None:
            self.recorder.epoch = int((state.epoch or 0) + 1e-6) + 1

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the epoch durable, with the optimizer's moments and the held-out losses."""
        if self.recorder is not None:
            self.recorder.end_epoch()
            if self._holdout:
                self._measure_holdout(kwargs["model"], self.recorder.epoch)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make durable what the checkpoint being saved has seen, so that resuming loses nothing."""
        if self.recorder is not None:
            self.recorder.flush()
            if state.is_world_process_zero:
                link = {"store": self.store.format.store, "run": self.recorder.run["run_id"]}
                path = _link_of(args, state)
                path.write_text(json.dumps(link))
                self.recorder.add_checkpoint(path.parent)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the run."""
        if self.recorder is not None:
            recorder, self.recorder = self.recorder, None
            recorder.finish()

    def _run_of_checkpoint(self, args: TrainingArguments, state: TrainerState) -> int | None:
        """The run that the checkpoint being resumed belongs to, if it says so."""
        path = _link_of(args, state)
        if not path.exists():
            return None
        link = json.loads(path.read_text())
        if link["store"] != self.store.format.store:
            raise CaptureError(
                f"{path.parent} belongs to a run in another store than {self.store.root}"
            )
        return int(link["run"])

    def _measure_holdout(self, model: torch.nn.Module, epoch: int) -> None:
        assert self.recorder is not None
        losses = sample_losses(model, list(self._holdout.values()))
        pairs = zip(self._holdout, losses.tolist(), strict=True)
        self.recorder.add_holdout_losses(dict(pairs), epoch)

    def _abort(self) -> None:
        if self.recorder is not None:
            recorder, self.recorder = self.recorder, None
            recorder.abort()


def _link_of(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir), f"checkpoint-{state.global_step}", "gradstore-run.json")
