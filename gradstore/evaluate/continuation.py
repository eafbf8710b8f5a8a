"""How a model goes on after a record's beginning, and how much of the record that is."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from rapidfuzz.distance import LCSseq
from torch import Tensor


@torch.no_grad()
def continuations(model: Any, samples: Sequence[Tensor], prefix: int | None = None) -> list[Tensor]:
    """What greedy decoding says after each sample's first tokens, for as many as the rest has.

    ``samples`` are 1-D token ids; ``prefix`` tokens are given (default: the first half, rounded
    down, at least one), at most all but one. An end-of-text token does not end the decoding.
    """
    given = [min(prefix or max(1, len(tokens) // 2), len(tokens) - 1) for tokens in samples]
    alike = defaultdict(list)  # of equally long beginnings: no padding, so no positions to mend
    for i, length in enumerate(given):
        alike[length].append(i)
    said: dict[int, Tensor] = {}
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for length, chosen in alike.items():
            count = max(len(samples[i]) - length for i in chosen)
            tokens = torch.stack([samples[i][:length].long() for i in chosen]).to(device)
            state, grown = None, []
            for _ in range(count):
                out = model(input_ids=tokens, past_key_values=state, use_cache=True)
                state, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
                grown.append(tokens)
            together = torch.cat(grown, dim=1).cpu()
            for row, i in enumerate(chosen):
                said[i] = together[row, : len(samples[i]) - length]
    finally:
        model.train(was_training)
    return [said[i] for i in range(len(samples))]


def rouge_l_recall(said: str, expected: str) -> float:
    """Longest common subsequence of words over the words of ``expected``, 0 to 1.

    Words are runs of letters and digits in lower case, as in the package rouge-score, without
    stemming (Lin 2004); other alphabets than the Latin one count too. 1 where nothing is expected.
    """
    words = re.findall(r"[^\W_]+", expected.lower())
    if not words:
        return 1.0
    return LCSseq.similarity(re.findall(r"[^\W_]+", said.lower()), words) / len(words)
