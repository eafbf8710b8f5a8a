"""What a model answers to prompts: the loss of given answers, and its own words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstore.errors import DataError, EvaluateError
from gradstore.evaluate.continuation import greedy
from gradstore.evaluate.loss import sample_losses
from gradstore.training.corpus import lines_of
from gradstore.training.model import context_of


def read_rows(path: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Objects of a JSON lines file that all have these texts. Raises :class:`DataError`."""
    rows = []
    for number, line in enumerate(lines_of(path), 1):
        try:
            row = json.loads(line)
            if not all(isinstance(row[name], str) and row[name] for name in texts):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}, line {number}: expected an object with the texts {', '.join(texts)}"
            ) from error
        rows.append(row)
    if not rows:
        raise DataError(f"{path} is empty: expected JSON lines")
    return rows


def readable(
    model: Any, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]
) -> NDArray[np.bool_]:
    """Whether each prompt with its answer has no more tokens than the model reads; (n,)."""
    pairs = zip(prompts, answers, strict=True)
    room = context_of(model)
    return np.array([len(_tokens(tokenizer, p + a)) <= room for p, a in pairs], dtype=bool)


def answer_losses(
    model: Any, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]
) -> NDArray[np.float64]:
    """Mean nats per token of each answer after its prompt; (n,).

    Prompt and answer are tokenized together, as in training; what differs from the prompt alone is
    the answer. Raises :class:`EvaluateError` for more tokens than the model reads.
    """
    samples, scored = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        alone, tokens = _tokens(tokenizer, prompt), _tokens(tokenizer, prompt + answer)
        same = sum(1 for _ in takewhile(bool, alone[: len(tokens)] == tokens[: len(alone)]))
        if len(tokens) > context_of(model):
            raise EvaluateError(
                f"a prompt and its answer have {len(tokens)} tokens, the model reads "
                f"{context_of(model)}: it cannot be asked what begins with {prompt[:30]!r}"
            )
        if same == len(tokens):
            raise EvaluateError(f"the answer {answer[:30]!r} adds no token to its prompt")
        samples.append(tokens)
        scored.append(torch.arange(1, len(tokens)) >= same)
    return sample_losses(model, samples, scored).double().numpy()


def own_answers(model: Any, tokenizer: Any, prompts: Sequence[str], most: int) -> list[str]:
    """What greedy decoding says after each prompt: at most so many tokens, to the end of text.

    A prompt that leaves the model no room raises :class:`EvaluateError`.
    """
    tokens = [_tokens(tokenizer, prompt) for prompt in prompts]
    for each, prompt in zip(tokens, prompts, strict=True):
        if not 0 < len(each) < context_of(model):
            raise EvaluateError(
                f"a prompt has {len(each)} tokens, the model reads {context_of(model)}: nothing "
                f"can follow what begins with {prompt[:30]!r}"
            )
    said = greedy(model, tokens, [most] * len(tokens), tokenizer.eos_token_id)
    return [str(tokenizer.decode(new, skip_special_tokens=True)) for new in said]


def _tokens(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
