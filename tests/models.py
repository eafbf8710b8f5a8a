"""What the capture tests share: tiny models, samples, batches, training, and the oracle.

The oracle, :func:`alone`, is autograd on one sample at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from gradstore import GradStoreCallback, IdCollator, Store
from gradstore.capture.taps import embedding_of, head_of, position_of
from gradstore.store.record import Record

VOCABULARY = 150
CONTEXT = 32
EXACT: dict[str, Any] = {"sides": "both", "top_k": VOCABULARY}  # a recorder's: nothing is left out
IGNORED = -100
KINDS = ("gpt2", "llama", "neox", "opt")
PEAK = 0.02  # a trainer's learning rate: the weights move far within an epoch

Batch = dict[str, Any]
State = dict[str, Tensor]
Gradients = dict[int, dict[str, Tensor]]  # by step (or epoch) and layer


def tiny(kind: str = "gpt2", *, tied: bool = True, seed: int = 0, **changes: Any) -> Any:
    """A two-layer causal language model without dropout; ``changes`` go to its config.

    Its weights are large enough for predictions that are far from uniform.
    """
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    wide = {"intermediate_size": 32, "initializer_range": 0.4}
    none = {"attention_dropout": 0.0}
    config: Any
    if kind == "gpt2":
        dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(**settings | dropouts | {"initializer_range": 0.4} | changes)
    elif kind == "llama":
        config = LlamaConfig(**settings | wide | none | changes)
    elif kind == "neox":
        config = GPTNeoXConfig(**settings | wide | none | {"hidden_dropout": 0.0} | changes)
    elif kind == "opt":
        more = {"ffn_dim": 32, "word_embed_proj_dim": 16, "init_std": 0.4, "pad_token_id": 1}
        config = OPTConfig(**settings | none | more | {"dropout": 0.0} | changes)
    else:
        config = AutoConfig.for_model(kind, **settings | wide | none | changes)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def samples(count: int, seed: int = 0, *, longest: int = 11) -> dict[str, Tensor]:
    """Token ids by sample id: at least two tokens, some of them repeated within a sample.

    Without OPT's padding, 1, whose gradient is another matter.
    """
    torch.manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (count,)).tolist()
    drawn = [torch.randint(2, VOCABULARY, (length,)) for length in lengths]
    for tokens in drawn:
        tokens[len(tokens) // 2] = tokens[0]
    return {f"sample-{i}": tokens for i, tokens in enumerate(drawn)}


def collate(side: str = "right", pad: int = 0) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
    """A collator that pads ``input_ids``, and ``labels`` (the ids, unless given), on ``side``.

    First tokens are not to be predicted: on the left, Transformers would do so from the padding.
    """

    def padded(rows: Sequence[Tensor], filling: int) -> Tensor:
        width = max(len(row) for row in rows)
        out = torch.full((len(rows), width), filling)
        for i, row in enumerate(rows):
            start = width - len(row) if side == "left" else 0
            out[i, start : start + len(row)] = row
        return out

    def together(features: Sequence[Mapping[str, Any]]) -> Batch:
        ids = [feature["input_ids"] for feature in features]
        labels = [feature.get("labels", feature["input_ids"]).clone() for feature in features]
        for row in labels:
            row[0] = IGNORED
        return {
            "input_ids": padded(ids, pad),
            "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
            "labels": padded(labels, IGNORED),
        }

    return together


def snapshot(model: nn.Module) -> State:
    """The model's weights as they are now."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@dataclass(frozen=True)
class Alone:
    """What autograd says of one sample by itself: mean loss, tokens counted, gradients.

    ``gradients`` has ``embedding``, ``head`` unless that is tied to it (then ``input``, what of the
    embedding's gradient does not come through the head), and ``position`` if there is one; all of
    the summed loss.
    """

    loss: float
    counted: int
    gradients: dict[str, Tensor]


def alone(
    fresh: nn.Module, state: State, tokens: Tensor, labels: Tensor | None = None, start: int = 0
) -> Alone:
    """Forward and backward of one sample, unpadded, on ``fresh`` with the weights of ``state``.

    ``start`` is the position of its first token, where padding takes up positions. A tied head is
    cut loose, so that its part of the gradient can be told from the embedding's.
    """
    fresh.load_state_dict(state)
    head, embedding = head_of(fresh), embedding_of(fresh)
    if tied := head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
    counting = {"position_ids": start + torch.arange(len(tokens))[None]} if start else {}
    logits = fresh(input_ids=tokens[None], **counting).logits[0, :-1]
    targets = (tokens if labels is None else labels)[1:]
    loss = cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    loss.backward()
    of = {name: weight.grad for name, weight in captured_weights(fresh).items()}
    gradients = {name: gradient for name, gradient in of.items() if gradient is not None}
    if tied:
        gradients["input"] = gradients["embedding"]
        gradients["embedding"] = gradients["input"] + gradients.pop("head")
    counted = int((targets != IGNORED).sum())
    return Alone(loss.item() / counted, counted, gradients)


def captured_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights whose gradients gradstore captures, by layer."""
    head, position = head_of(model), position_of(model)
    weights: dict[str, Any] = {"embedding": embedding_of(model).weight}
    if head.weight is not weights["embedding"]:
        weights["head"] = head.weight
    if position is not None:
        weights["position"] = position[0].weight
    return weights


def differences(store: Store, record: Record, truth: Alone) -> dict[str, float]:
    """Relative error of each gradient that a record with both sides can give."""
    errors = {}
    for layer, true in truth.gradients.items():
        if layer == "input":
            found = record.gradient(store.model, sides="input")
        else:
            found = record.gradient(store.model, layer)
        errors[layer] = relative(found.dense(), true)
    return errors


def records(store: Store) -> dict[str, list[Record]]:
    """All that the newest run captured: each sample's records by epoch."""
    found: dict[str, list[Record]] = {}
    numbers = [number for (number,) in store.rows("SELECT sample_id FROM samples ORDER BY 1")]
    for record in store.records(numbers, store.run()["run_id"]):
        found.setdefault(record.exposure.id, []).append(record)
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found - expected).norm() / expected.norm())


def sgd(model: Any, rate: float = 0.1) -> torch.optim.SGD:
    """Plain gradient descent."""
    return torch.optim.SGD(model.parameters(), lr=rate)


def batch_of(tokens: Mapping[str, Tensor], side: str = "right") -> Batch:
    """A batch as a model takes it, ids included."""
    batch = collate(side)([{"input_ids": ids} for ids in tokens.values()])
    return batch | {"sample_ids": list(tokens)}


def take_step(model: Any, optimizer: torch.optim.Optimizer, *batches: Batch) -> None:
    """Accumulate the batches' gradients and apply them."""
    for batch in batches:
        model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def epochs_of(store: Store) -> dict[str, list[int]]:
    """The epochs at which each sample was captured."""
    return {id: [r.exposure.epoch for r in found] for id, found in records(store).items()}


@dataclass
class Witness(TrainerCallback):
    """Notes, for each optimizer step, the weights before it and the gradients it was given."""

    before: dict[int, State] = field(default_factory=dict)
    applied: Gradients = field(default_factory=dict)
    epochs: dict[int, State] = field(default_factory=dict)
    moments: Gradients = field(default_factory=dict)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before[state.global_step + 1] = snapshot(kwargs["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.applied[state.global_step + 1] = {
            layer: weight.grad.clone()
            for layer, weight in captured_weights(kwargs["model"]).items()
            if weight.grad is not None
        }

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.epochs[round(state.epoch)] = snapshot(model)
        self.moments[round(state.epoch)] = {
            layer: optimizer.state[weight]["exp_avg_sq"].clone()
            for layer, weight in captured_weights(model).items()
            if "exp_avg_sq" in optimizer.state[weight]
        }


def train(
    model: Any,
    data: Sequence[Mapping[str, Any]],
    callback: GradStoreCallback,
    folder: Path,
    *,
    side: str = "right",
    collator: Any = None,
    resume: bool = False,
    watch: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> tuple[Witness, Trainer]:
    """Train with capture; ``arguments`` are those of ``TrainingArguments``."""
    settings: dict[str, Any] = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 3,
        "learning_rate": PEAK,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "logging_strategy": "steps",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    witness = Witness()
    trainer = Trainer(
        model,
        TrainingArguments(str(folder / "out"), **settings | arguments),
        data_collator=collator or IdCollator(collate(side)),
        train_dataset=list(data),
        callbacks=[callback, witness, *watch],
    )
    with callback:
        trainer.train(resume_from_checkpoint=resume or None)
    return witness, trainer


def rows(tokens: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Samples as a data set for a trainer."""
    return [{"id": sample, "input_ids": ids} for sample, ids in tokens.items()]
