"""How well a model reads a text that has nothing to do with what it forgot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradstore.errors import DataError, EvaluateError
from gradstore.evaluate.divergence import per_token
from gradstore.evaluate.loss import token_losses
from gradstore.evaluate.statistics import Estimate
from gradstore.training.corpus import lines_of
from gradstore.training.model import context_of

LONGEST = 2048  # tokens of a window: the logits of more would not fit into memory

Nats = list[Float[Tensor, " n"]]  # the loss of each of a window's predictions


def windows(path: Path, tokenizer: Any, model: Any) -> list[Int[Tensor, " t"]]:
    """A UTF-8 text's tokens, cut one after the other into windows of the model's context.

    They do not overlap, have at most 2,048 tokens, and the last one may be shorter; one of a single
    token predicts nothing and is left out. Raises :class:`DataError` for a file that is no text or
    has fewer than two tokens, :class:`EvaluateError` without a tokenizer.
    """
    if tokenizer is None:
        raise EvaluateError("no checkpoint has a tokenizer to read a general text with: add one")
    tokens = tokenizer("".join(lines_of(path)), verbose=False)["input_ids"]
    width = min(context_of(model), LONGEST)
    found = [torch.tensor(tokens[at : at + width]) for at in range(0, len(tokens), width)]
    if not (found := [window for window in found if len(window) > 1]):
        raise DataError(f"{path} has {len(tokens)} tokens: perplexity needs a text of at least two")
    return found


def read(models: Mapping[str, Any], cut: Sequence[Int[Tensor, " t"]]) -> dict[str, Nats]:
    """The loss of every prediction in a text's :func:`windows`, by model; nats, on the CPU."""
    return {name: token_losses(model, cut) for name, model in models.items()}


def loss(nats: Nats) -> Estimate:
    """Mean nats per token over all predictions of all windows.

    The first token of a window is not predicted, and no token sees beyond its window. The interval
    draws windows, or tokens of fewer than eight windows.
    """
    return per_token(nats)


def perplexity(nats: Nats) -> Estimate:
    """exp of :func:`loss` and of the ends of its interval: as many tokens seem equally likely."""
    with np.errstate(over="ignore"):
        return Estimate(*(float(np.exp(part)) for part in vars(loss(nats)).values()))


def digest_of(path: Path) -> str:
    """SHA-256 of the file, by which two evaluations know that they read the same text."""
    return sha256(path.read_bytes()).hexdigest()
