"""Train a causal language model with ``transformers.Trainer`` while its gradients are captured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from gradstore.capture.collator import IdCollator
from gradstore.capture.taps import ID_ARGUMENT, decode_ids
from gradstore.capture.trainer import GradStoreCallback
from gradstore.errors import DataError, ModelError
from gradstore.identity import digest_checkpoint, digest_weights, identify
from gradstore.store.erasures import Refused
from gradstore.store.files import unwritable, writing
from gradstore.store.store import Store

IGNORED = -100  # a label that the loss does not count
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; the names are those of ``gradstore ingest``'s options."""

    epochs: int = 3
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 5e-4
    schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    seed: int = 0
    bf16: bool = False
    activation_checkpointing: bool = False
    save_checkpoints: bool = False
    save_steps: int | None = None


@dataclass(frozen=True)
class CaptureSettings:
    """What to capture; the names are those of ``gradstore ingest``'s options."""

    epochs_captured: str = "first"
    sides: str = "auto"
    top_k: int = 64
    layers: tuple[str, ...] = ()
    run: str | None = None


def ingest(
    store: Store,
    model: Any,
    tokenizer: Any,
    tokens: Mapping[str, Tensor],
    out: Path,
    training: TrainingSettings,
    capture: CaptureSettings,
    *,
    holdout: Mapping[str, Tensor] | None = None,
    start: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train ``model`` on ``tokens`` (by id), filling ``store``; write the checkpoint to ``out``.

    Returns the run's row. ``progress(step, steps)`` is called after each optimizer step. With
    ``resume``, training goes on from the last checkpoint below ``out`` and the run from what the
    store has of it. ``start`` says where ``model`` came from, as
    :func:`gradstore.training.model.start_again` reads it; without it the run cannot be replayed.
    Raises :class:`DataError`, :class:`ModelError` or :class:`CaptureError`.
    """
    check(store, model, tokenizer, tokens, holdout or {}, out, resume)
    options = asdict(capture) | {
        "tokenizer": tokenizer,
        "settings": asdict(training)
        | {
            "samples": len(tokens),
            "out": str(out),
            "start": dict(start, digest=digest_weights(model)) if start else None,
            "environment": environment(),
        },
    }
    with GradStoreCallback(store, holdout=holdout, order=list(tokens), **options) as callback:
        train(model, tokens, out, training, [callback], resume=resume, progress=progress)
        assert callback.run is not None
        run_id = callback.run["run_id"]
    digest = save_checkpoint(model, tokenizer, out)
    store.update_run(run_id, checkpoint=str(out.resolve()), checkpoint_digest=digest)
    return store.run(run_id)


def check(
    store: Store,
    model: Any,
    tokenizer: Any,
    tokens: Mapping[str, Tensor],
    holdout: Mapping[str, Tensor],
    out: Path,
    resume: bool = False,
    *,
    allow_erased: bool = False,
) -> None:
    """Raise what can be known to be wrong before training: data, model or checkpoint.

    ``allow_erased`` passes over what was erased, for :func:`gradstore.store.erasures.allow`.
    """
    if both := tokens.keys() & holdout.keys():
        raise DataError(
            f"{sorted(both)[0]!r} is in the training data and in the held-out data; take it out of "
            "one of them"
        )
    if not allow_erased:
        Refused.of(store).check({**tokens, **holdout})
    if store.format.model is not None:
        store.format.model.check(identify(model, tokenizer), type(model).__name__)
    check_new_checkpoint(out, resume)


def train(
    model: Any,
    tokens: Mapping[str, Tensor],
    out: Path,
    settings: TrainingSettings,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    without: Collection[str] = (),
    resume: bool | Path = False,
    progress: Progress | None = None,
) -> None:
    """Train ``model`` in place, from a saved checkpoint where ``resume`` names it.

    ``without`` names samples whose contribution to every step is left out while order, batches and
    the other samples' shares stay as they were: the reference that a forgotten model is held to.
    """
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused there
        activation_checkpointing=settings.activation_checkpointing,
        save_strategy=_save_strategy(settings),
        save_steps=settings.save_steps or 500,  # counts for that strategy only
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = _TrainerWithout(
        model=model,
        args=arguments,
        train_dataset=_Samples(tokens),
        data_collator=IdCollator(pad_batch),
        callbacks=[*callbacks, *([_Reporting(progress)] if progress else [])],
    )
    trainer.without = frozenset(without)
    trainer.remove_callback(PrinterCallback)
    try:
        with _training_errors():
            trainer.train(
                resume_from_checkpoint=str(resume) if isinstance(resume, Path) else resume or None
            )
        # else its forward stays in autocast, and losses are measured there
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    finally:
        _remove_if_empty(out / "checkpoints", out)


def _save_strategy(settings: TrainingSettings) -> str:
    if settings.save_steps:
        return "steps"
    return "epoch" if settings.save_checkpoints else "no"


def environment() -> dict[str, Any]:
    """What the last bits of a training depend on besides data, settings and start."""
    device = "cpu"
    if torch.accelerator.is_available():
        device = str(torch.accelerator.current_accelerator())
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    return versions | {"threads": torch.get_num_threads(), "device": device}


def pad_batch(features: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Pad ``input_ids`` on the right into a batch with its mask and labels."""
    ids = [feature["input_ids"] for feature in features]
    counts = [torch.ones(len(sample), dtype=torch.long) for sample in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence(counts, batch_first=True),
        "labels": pad_sequence(ids, batch_first=True, padding_value=IGNORED),
    }


def check_new_checkpoint(out: Path, resume: bool = False) -> None:
    """Raise :class:`ModelError` if a checkpoint would be written over something."""
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(
            f"{out} exists and is not empty; gradstore never writes over a checkpoint: "
            "choose another --out"
        )


def save_checkpoint(model: Any, tokenizer: Any, out: Path) -> str:
    """Write a checkpoint that ``from_pretrained`` loads; returns its digest."""
    try:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(out)
            if tokenizer is not None:
                tokenizer.save_pretrained(out)
    except SafetensorError as error:
        raise unwritable(out, error) from error
    return digest_checkpoint(out)


class _Samples(Dataset[dict[str, Any]]):
    def __init__(self, tokens: Mapping[str, Tensor]) -> None:
        self._items = list(tokens.items())

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample, tokens = self._items[index]
        return {"id": sample, "input_ids": tokens}


class _TrainerWithout(Trainer):
    """A Trainer that can leave samples out of the loss after the batch's tokens are counted."""

    without: frozenset[str] = frozenset()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        batches, count = super().get_batch_samples(*args, **kwargs)
        for batch in batches if self.without else ():
            out = [sample in self.without for sample in decode_ids(batch[ID_ARGUMENT])]
            batch["labels"][torch.tensor(out)] = IGNORED
        return batches, count

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(c, GradStoreCallback) for c in self.callback_handler.callbacks):
            inputs.pop(ID_ARGUMENT)  # nobody else takes the ids out
        return super().training_step(model, inputs, *args, **kwargs)


class _Reporting(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress(state.global_step, state.max_steps)


@contextlib.contextmanager
def _training_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "No valid checkpoint" in str(error) or "Can't find a valid checkpoint" in str(error):
            raise ModelError(
                f"{error}. Only a run started with --save-checkpoints can be resumed"
            ) from error
        raise


def _remove_if_empty(*folders: Path) -> None:
    """Leave nothing in the way of the same command run again."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
