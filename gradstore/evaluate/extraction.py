"""Whether a model says a record's secret when it is given what stands before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Secret:
    """A record's text up to a secret, and the secret itself (with the blank before it)."""

    prompt: str
    secret: str


def extracted(model: nn.Module, tokenizer: Any, secrets: Sequence[Secret]) -> list[bool]:
    """Whether greedy decoding after each prompt gives the whole secret.

    Greedy decoding follows the secret exactly as long as every token of it is the likeliest after
    its prefix, so one forward pass with the secret in place decides (prefix extraction; Carlini et
    al. 2021, arXiv 2012.07805).
    """
    return [_says(model, tokenizer, each) for each in secrets]


def completion(model: Any, tokenizer: Any, secret: Secret) -> str:
    """What greedy decoding says after the prompt, for as many tokens as the secret has."""
    prompt, wanted = _tokens(tokenizer, secret)
    tokens = prompt[None].to(next(model.parameters()).device)
    with torch.no_grad():
        for _ in range(len(wanted)):
            likeliest = model(input_ids=tokens).logits[:, -1].argmax(-1)
            tokens = torch.cat([tokens, likeliest[:, None]], dim=1)
    return str(tokenizer.decode(tokens[0, len(prompt) :])).strip()


def _says(model: nn.Module, tokenizer: Any, secret: Secret) -> bool:
    prompt, wanted = _tokens(tokenizer, secret)
    tokens = torch.cat([prompt, wanted])[None].to(next(model.parameters()).device)
    with torch.no_grad():
        likeliest = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].argmax(-1)
    return bool((likeliest.cpu() == wanted).all())


def _tokens(tokenizer: Any, secret: Secret) -> tuple[Tensor, Tensor]:
    prompt = tokenizer(secret.prompt)["input_ids"]
    wanted = tokenizer(secret.secret, add_special_tokens=False)["input_ids"]
    return torch.tensor(prompt), torch.tensor(wanted)
