"""Whether a model says a record's secret when it is given what stands before it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradstore.errors import DataError, EvaluateError
from gradstore.evaluate.audience import Audience
from gradstore.evaluate.continuation import beams, greedy
from gradstore.training.corpus import lines_of
from gradstore.training.model import context_of

BEAMS = 4


@dataclass(frozen=True)
class Secret:
    """A record's text up to a secret, and the secret itself (with the blank before it)."""

    prompt: str
    secret: str


def read_secrets(path: Path) -> dict[str, Secret]:
    """Secrets by sample id, of JSON lines with ``id``, ``prompt`` and ``secret``.

    A blank is put before a secret where neither it nor its prompt has one. Lines without a secret
    are passed over. Raises :class:`DataError` naming the line.
    """
    secrets = {}
    for number, line in enumerate(lines_of(path), 1):
        try:
            row = json.loads(line)
            prompt, secret = row.get("prompt"), row.get("secret")
            if prompt and secret:
                if not (isinstance(prompt, str) and isinstance(secret, str)):
                    raise TypeError("no text")
                apart = prompt[-1].isspace() or secret[0].isspace()
                secrets[str(row["id"])] = Secret(prompt, secret if apart else f" {secret}")
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}, line {number}: expected an object with id, prompt and secret"
            ) from error
    return secrets


def extracted(model: nn.Module, tokenizer: Any, secrets: Sequence[Secret]) -> list[bool]:
    """Whether greedy decoding after each prompt gives the whole secret.

    Greedy decoding follows the secret exactly as long as every token of it is the likeliest after
    its prefix, so one forward pass with the secret in place decides (prefix extraction; Carlini et
    al. 2021, arXiv 2012.07805).
    """
    return [_says(model, tokenizer, each) for each in secrets]


def extracted_beam(
    model: nn.Module, tokenizer: Any, secrets: Sequence[Secret], width: int = BEAMS
) -> list[bool]:
    """Whether the likeliest continuation of each prompt by beam search is the whole secret.

    The search keeps ``width`` continuations of as many tokens as the secret has
    (:func:`~gradstore.evaluate.continuation.beams`). It finds secrets with an unlikely beginning,
    which greedy decoding misses, and may miss what that finds: ask both.
    """
    return [_finds(model, tokenizer, each, width) for each in secrets]


def asked_of(
    model: Any, tokenizer: Any, audience: Audience, secrets: Mapping[str, Secret]
) -> dict[int, Secret]:
    """The secrets (by sample id) that an audience's members have, by their places in it.

    Raises :class:`EvaluateError` without a tokenizer, where none is of the forgotten, and for one
    that is longer with its prompt than what the model reads.
    """
    if tokenizer is None:
        raise EvaluateError("no checkpoint has a tokenizer to ask for secrets with: add one")
    asked = {at: secrets[i] for at, (i, _) in enumerate(audience.members) if i in secrets}
    if not asked.keys() & {*audience.of("forget")}:
        raise EvaluateError(
            "extract and exposure need secrets of the forgotten: give --secrets lines with their "
            "ids"
        )
    for secret in asked.values():
        _fitting(model, tokenizer, secret)
    return asked


def extractions(
    model: nn.Module, tokenizer: Any, asked: Mapping[int, Secret], count: int
) -> dict[str, NDArray[np.float64]]:
    """The metrics ``extracted`` and ``extracted_beam``: 1, 0, or NaN for no secret; (count,) each.

    ``asked`` are secrets by place, as :func:`asked_of` finds them.
    """
    values = {}
    for name, decode in (("extracted", extracted), ("extracted_beam", extracted_beam)):
        values[name] = np.full(count, math.nan)
        values[name][list(asked)] = decode(model, tokenizer, list(asked.values()))
    return values


def completion(model: Any, tokenizer: Any, secret: Secret) -> str:
    """What greedy decoding says after the prompt, for as many tokens as the secret has."""
    prompt, wanted = _tokens(tokenizer, secret)
    [said] = greedy(model, [prompt], [len(wanted)])
    return str(tokenizer.decode(said)).strip()


def _says(model: nn.Module, tokenizer: Any, secret: Secret) -> bool:
    prompt, wanted = _fitting(model, tokenizer, secret)
    tokens = torch.cat([prompt, wanted])[None].to(next(model.parameters()).device)
    with torch.no_grad():
        likeliest = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].argmax(-1)
    return bool((likeliest.cpu() == wanted).all())


def _finds(model: nn.Module, tokenizer: Any, secret: Secret, width: int) -> bool:
    prompt, wanted = _fitting(model, tokenizer, secret)
    return torch.equal(beams(model, prompt, len(wanted), width)[0], wanted)


def _fitting(model: nn.Module, tokenizer: Any, secret: Secret) -> tuple[Tensor, Tensor]:
    """The tokens of prompt and secret; refused where the model cannot read them."""
    prompt, wanted = _tokens(tokenizer, secret)
    if len(prompt) + len(wanted) > context_of(model):
        raise EvaluateError(
            f"a prompt and its secret have {len(prompt) + len(wanted)} tokens, the model reads "
            f"{context_of(model)}: shorten the prompt that begins with {secret.prompt[:20]!r}"
        )
    return prompt, wanted


def _tokens(tokenizer: Any, secret: Secret) -> tuple[Tensor, Tensor]:
    prompt = tokenizer(secret.prompt)["input_ids"]
    wanted = tokenizer(secret.secret, add_special_tokens=False)["input_ids"]
    return torch.tensor(prompt), torch.tensor(wanted)
