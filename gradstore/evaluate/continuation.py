"""How a model goes on after a record's beginning, and how much of the record that is."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from rapidfuzz.distance import LCSseq
from torch import Tensor

from gradstore.training.model import context_of

TOGETHER = 32  # prompts of one length that are decoded at once


def continuations(model: Any, samples: Sequence[Tensor], prefix: int | None = None) -> list[Tensor]:
    """What greedy decoding says after each sample's first tokens, for as many as the rest has.

    ``samples`` are 1-D token ids; ``prefix`` tokens are given (default: the first half, rounded
    down, at least one), at most all but one. An end-of-text token does not end the decoding.
    """
    given = [min(prefix or max(1, len(tokens) // 2), len(tokens) - 1) for tokens in samples]
    prompts = [tokens[:length] for tokens, length in zip(samples, given, strict=True)]
    counts = [len(tokens) - length for tokens, length in zip(samples, given, strict=True)]
    return greedy(model, prompts, counts)


@torch.no_grad()
def greedy(
    model: Any, prompts: Sequence[Tensor], counts: Sequence[int], end: int | None = None
) -> list[Int[Tensor, " new"]]:
    """What greedy decoding adds to each prompt: so many tokens, or fewer where ``end`` comes.

    ``prompts`` are 1-D token ids, at least one each; no more is added than the model can read. An
    ``end`` that was said is the last token of what comes back, on the CPU. The model is evaluated
    without dropout, and left in the mode it was in.
    """
    room = context_of(model)
    wanted = [min(n, room - len(each)) for each, n in zip(prompts, counts, strict=True)]
    alike = defaultdict(list)  # of equally long prompts: no padding, so no positions to mend
    for i, prompt in enumerate(prompts):
        alike[len(prompt)].append(i)
    said = [torch.zeros(0, dtype=torch.long)] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for same in alike.values():
            for at in range(0, len(same), TOGETHER):
                chosen = same[at : at + TOGETHER]
                count = max(wanted[i] for i in chosen)
                together = torch.stack([prompts[i].long() for i in chosen])
                for i, row in zip(chosen, _grown(model, together, count, end), strict=True):
                    ends = [] if end is None else (row == end).nonzero().flatten().tolist()
                    length = ends[0] + 1 if ends else len(row)
                    said[i] = row[: max(0, min(length, wanted[i]))]
    finally:
        model.train(was_training)
    return said


def _grown(
    model: Any, prompts: Int[Tensor, "b t"], count: int, end: int | None
) -> Int[Tensor, "b new"]:
    """``count`` tokens more of each; fewer where all have ended."""
    tokens, state = prompts.to(next(model.parameters()).device), None
    ended = torch.zeros(len(prompts), 1, dtype=torch.bool, device=tokens.device)
    for _ in range(count):
        logits, state = _next(model, tokens, state)
        following = logits.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, following], dim=1)
        if end is not None:
            ended |= following == end
            if bool(ended.all()):
                break
    return tokens[:, prompts.shape[1] :].cpu()


def _next(model: Any, tokens: Int[Tensor, "b t"], state: Any) -> tuple[Float[Tensor, "b V"], Any]:
    """Logits of what follows, and what the model keeps of ``tokens``: None where that is nothing we
    know (a recurrent model's), and it reads all of them each time."""
    new = tokens if state is None else tokens[:, -1:]
    takes = signature(model.forward).parameters
    name = "cache" if "cache" in takes else "past_key_values"  # as it was before transformers 5.24
    out = model(input_ids=new, use_cache=True, **{name: state})
    return out.logits[:, -1], getattr(out, name, None)


@torch.no_grad()
def beams(
    model: Any, prompt: Int[Tensor, " t"], count: int, width: int
) -> Int[Tensor, "beams new"]:
    """What beam search adds to a prompt: ``width`` continuations of ``count`` tokens, likeliest
    first, on the CPU (fewer where the vocabulary has fewer).

    Each step keeps those with the greatest sum of log-probabilities. An end-of-text token is one
    like others, and nothing is penalized. A ``width`` of 1 is greedy decoding. The model is
    evaluated without dropout, and left in the mode it was in; ``prompt`` and ``count`` tokens want
    to fit its context.
    """
    tokens, state = prompt.long()[None].to(next(model.parameters()).device), None
    scores = torch.zeros(1, device=tokens.device)
    was_training = model.training
    model.eval()
    try:
        for _ in range(count):
            logits, state = _next(model, tokens, state)
            each = logits.float().log_softmax(-1)
            totals = (scores[:, None] + each).flatten()
            scores, best = totals.topk(min(width, len(totals)))
            parents = best // each.shape[1]
            tokens = torch.cat([tokens[parents], (best % each.shape[1])[:, None]], dim=1)
            if state is not None:
                state.reorder_cache(parents)
    finally:
        model.train(was_training)
    return tokens[:, len(prompt) :].cpu()


def rouge_l_recall(said: str, expected: str) -> float:
    """Longest common subsequence of words over the words of ``expected``, 0 to 1.

    Words are runs of letters and digits in lower case, as in the package rouge-score, without
    stemming (Lin 2004); other alphabets than the Latin one count too. 1 where nothing is expected.
    """
    words = re.findall(r"[^\W_]+", expected.lower())
    if not words:
        return 1.0
    return LCSseq.similarity(re.findall(r"[^\W_]+", said.lower()), words) / len(words)
