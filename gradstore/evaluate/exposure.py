"""How much likelier a model finds a secret than random strings of its form: its exposure."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradstore.errors import EvaluateError
from gradstore.evaluate.extraction import Secret
from gradstore.evaluate.loss import token_losses
from gradstore.training.model import context_of

CANDIDATES = 1024  # strings that a secret is ranked among, itself included
_ALPHABETS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)


@dataclass(frozen=True)
class Lineup:
    """The tokens of a prompt, and of all strings that may follow it; the secret is the first."""

    prompt: list[int]
    strings: list[list[int]]


def exposure(
    model: Any, tokenizer: Any, secret: Secret, candidates: int = CANDIDATES, seed: int = 0
) -> float:
    """log2 N - log2 rank of the secret among N strings of its form; bits, 0 to log2 N.

    Rank 1 is the likeliest. The others are drawn at random, all different: a digit for every digit,
    a small or capital letter (a to z) for every such letter; what else there is stays. N is
    ``candidates``, or as many strings as the form has, if those are fewer: then the figure is
    exact, else an estimate of log2 |R| - log2 rank among all |R| strings of the form (Carlini et
    al. 2019, The Secret Sharer, arXiv 1802.08232: exposure, and its approximation by sampling).
    Strings are ranked by the sum of log p of their tokens after the prompt; those as likely as the
    secret (to a millionth of a nat) count half, so that a model to which all are the same has about
    1 bit.

    A random secret that was never seen has about log2 e = 1.44 bits on average. Words, and digits
    that many records share (an area code), are likelier than random ones to any model that knows
    the language or the others: compare with one that never saw the secret, or move them into the
    prompt.
    Raises :class:`EvaluateError` for a secret without digits and letters, and where prompt and
    string are more than the model reads.
    """
    return bits(model, lineup(model, tokenizer, secret, candidates, seed))


def lineup(
    model: Any, tokenizer: Any, secret: Secret, candidates: int = CANDIDATES, seed: int = 0
) -> Lineup:
    """What :func:`exposure` ranks; the errors are its own."""
    strings = [secret.secret, *others(secret.secret, candidates - 1, seed)]
    found = Lineup(
        tokenizer(secret.prompt)["input_ids"],
        [tokenizer(each, add_special_tokens=False)["input_ids"] for each in strings],
    )
    longest = len(found.prompt) + max(map(len, found.strings))
    if longest > context_of(model):
        raise EvaluateError(
            f"a prompt and strings like its secret have {longest} tokens, the model reads "
            f"{context_of(model)}: shorten the prompt that begins with {secret.prompt[:20]!r}"
        )
    return found


def bits(model: Any, of: Lineup) -> float:
    """The :func:`exposure` of the first string among all."""
    nats = token_losses(model, [torch.tensor(of.prompt + end) for end in of.strings])
    likely = np.round(
        [
            -float(each[-len(end) :].double().sum())
            for each, end in zip(nats, of.strings, strict=True)
        ],
        6,
    )
    above, same = (likely[1:] > likely[0]).sum(), (likely[1:] == likely[0]).sum()
    return math.log2(len(of.strings)) - math.log2(1 + above + same / 2)


def others(secret: str, count: int, seed: int) -> list[str]:
    """Other strings of a secret's form, all different; all there are, if those are fewer."""
    form = [next((a for a in _ALPHABETS if each in a), each) for each in secret]
    size = math.prod(map(len, form))
    if size == 1:
        raise EvaluateError(
            "a secret has neither digits nor letters of a to z: there are no others of its form"
        )
    if size - 1 <= count:
        return [each for number in range(size) if (each := _spelled(form, number)) != secret]
    draw, found = random.Random(seed), {secret: None}  # in the order they are drawn
    while len(found) <= count:
        found[_spelled(form, draw.randrange(size))] = None
    return list(found)[1:]


def _spelled(form: Sequence[str], number: int) -> str:
    """The string of a form that has this number, counting in mixed radix."""
    letters = []
    for alphabet in reversed(form):
        number, at = divmod(number, len(alphabet))
        letters.append(alphabet[at])
    return "".join(reversed(letters))


def exposures(model: Any, lineups: Mapping[int, Lineup], count: int) -> NDArray[np.float64]:
    """The :func:`bits` of each lineup at its place, NaN elsewhere; (count,)."""
    values = np.full(count, math.nan)
    for at, each in lineups.items():
        values[at] = bits(model, each)
    return values
