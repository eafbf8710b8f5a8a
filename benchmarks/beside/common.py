"""What every library is given, and what it has to do with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers.pytorch_utils import Conv1D

from gradstore.training.model import load_model

BATCH = 8
IGNORED = -100
Scores = NDArray[np.float64]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """A model, the records it was trained on (1-D token ids), an empty folder to store things."""

    checkpoint: Path
    records: Sequence[Tensor]
    folder: Path


class Peer(Protocol):
    """A method of a library, at its documented settings."""

    def build(self) -> None:
        """Go through the records once and store what queries need."""

    def gradients(self, queries: Sequence[Tensor]) -> Any:
        """What a search takes of queries: their gradients, or what they are computed from."""

    def search(self, asked: Any) -> Scores:
        """(records, queries), positive where a record helped."""

    def sizes(self) -> tuple[int, int]:
        """Bytes on disk: of all records, and once whatever their number."""


def batches(samples: Sequence[Tensor], size: int = BATCH) -> Iterator[Batch]:
    """Padded at the end; padding has no label."""
    for start in range(0, len(samples), size):
        some = [tokens.long() for tokens in samples[start : start + size]]
        labels = pad_sequence(some, batch_first=True, padding_value=IGNORED)
        yield {
            "input_ids": labels.clamp(min=0),
            "labels": labels,
            "attention_mask": (labels != IGNORED).long(),
        }


def rows(samples: Sequence[Tensor]) -> list[Batch]:
    """Samples as a data loader joins them: all padded to the longest."""
    [whole] = batches(samples, len(samples))
    return [{name: of[at] for name, of in whole.items()} for at in range(len(samples))]


def summed_loss(network: nn.Module, batch: Batch) -> Tensor:
    """Next-token cross-entropy, summed over tokens and samples."""
    logits = network(input_ids=batch["input_ids"]).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    return cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="sum")


def linearized(checkpoint: Path) -> nn.Module:
    """The model with GPT-2's Conv1D as the Linear that it is, which these libraries look for."""
    network: nn.Module = load_model(checkpoint)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.load_state_dict({"weight": child.weight.mT, "bias": child.bias})
                setattr(module, name, linear)
    return network.eval()


def bytes_of(*paths: Path) -> int:
    """Bytes of all files below."""
    files = {file for path in paths for file in [path, *path.rglob("*")] if file.is_file()}
    return sum(file.stat().st_size for file in files)


def epoch(
    network: nn.Module, optimizer: torch.optim.Optimizer, records: Sequence[Tensor], **more: Any
) -> None:
    """Train on each record once; ``more`` may name them, a list of ids for each batch."""
    for number, batch in enumerate(batches(records)):
        network(**batch, **{name: given[number] for name, given in more.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
