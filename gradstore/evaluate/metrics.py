"""What one forward pass says about each sample: how well the model knows it.

With n = t - 1 predictions of a sample's t tokens, l_i = log p(x_i | x_<i) and all logarithms
natural, so in nats. Definitions follow OpenUnlearning (arXiv 2506.12618) but where a docstring says
otherwise.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gradstore.capture.taps import embedding_of

LOWEST = 0.2  # share of the tokens that Min-K% looks at (arXiv 2310.16789)
_LOGITS_AT_ONCE = 1 << 22  # several tensors of this size live at once
_LEAST_VARIANCE = 1e-6  # a distribution that is certain has none


@dataclass(frozen=True)
class Predictions:
    """A model's predictions of one sample's n tokens after the first; all float64 on the CPU.

    ``log_probs``: of the tokens that come; ``means`` and ``deviations``: of log p(z | x_<i) over
    the vocabulary, z drawn from p; ``likeliest``: whether the token that comes is the argmax.
    """

    log_probs: Float[Tensor, " n"]
    means: Float[Tensor, " n"]
    deviations: Float[Tensor, " n"]
    likeliest: Bool[Tensor, " n"]


def predictions(model: nn.Module, samples: Sequence[Tensor]) -> list[Predictions]:
    """Each sample's predictions; ``samples`` are 1-D token ids, at least two each.

    The model is evaluated without dropout, and left in the mode it was in.
    """
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]))
    found: dict[int, Predictions] = {}
    positions = _LOGITS_AT_ONCE // embedding_of(model).num_embeddings
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        while order:
            width = len(samples[order[-1]])
            count = max(1, positions // width)
            chosen, order = order[-count:], order[:-count]
            tokens = torch.zeros(len(chosen), width, dtype=torch.long)
            for row, i in enumerate(chosen):
                tokens[row, : len(samples[i])] = samples[i].long()
            for i, each in zip(chosen, _predict(model, tokens.to(device)), strict=True):
                n = len(samples[i]) - 1
                found[i] = Predictions(*(part[:n] for part in each))
    finally:
        model.train(was_training)
    return [found[i] for i in range(len(samples))]


@torch.no_grad()
def _predict(model: nn.Module, tokens: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each row. Padding stands to the right, where a causal model does not look."""
    logs = model(input_ids=tokens).logits[:, :-1].float().log_softmax(-1)
    likeliest = logs.argmax(-1) == tokens[:, 1:]
    log_probs = logs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    probs = logs.exp()
    logs = logs.where(probs > 0, 0.0)  # 0 log 0 = 0
    means = (probs * logs).sum(-1)
    variances = (probs * (logs - means[..., None]).square()).sum(-1)
    deviations = variances.clamp(min=_LEAST_VARIANCE).sqrt()
    parts = [part.double().cpu() for part in (log_probs, means, deviations)]
    return list(zip(*parts, likeliest.cpu(), strict=True))


def loss(of: Predictions) -> float:
    """Mean of -l: nats per token."""
    return -float(of.log_probs.mean())


def probability(of: Predictions) -> float:
    """exp(mean l): the geometric mean of the tokens' probabilities, 0 to 1."""
    return float(of.log_probs.mean().exp())


def mean_probability(of: Predictions) -> float:
    """Mean over the n tokens of p(x_i | x_<i): how many of them drawing at random would give.

    The arithmetic mean. :func:`probability`, the geometric one, orders samples as their loss does;
    this one does not, and few impossible tokens do not hide many that are known.
    """
    return float(of.log_probs.exp().mean())


def exact_memorization(of: Predictions) -> float:
    """Share of the n tokens that are the model's likeliest after their true prefix."""
    return float(of.likeliest.double().mean())


def extraction_strength(of: Predictions) -> float:
    """1 - k/n, k the least number of leading predictions after which all are the likeliest.

    1: the first token brings all others; 0: the last token is wrong (OpenUnlearning gives 1/n).
    Carlini et al.'s definition as in arXiv 2411.05277.
    """
    wrong = (~of.likeliest).nonzero()
    k = int(wrong[-1]) + 1 if len(wrong) else 0
    return 1 - k / len(of.likeliest)


def min_k(of: Predictions, share: float = LOWEST) -> float:
    """Min-K%: mean of the lowest ``share`` of l, at least one; nats, higher = better known.

    Shi et al. 2023, arXiv 2310.16789, equation 1.
    """
    return _mean_of_lowest(of.log_probs, share)


def min_k_plus_plus(of: Predictions, share: float = LOWEST) -> float:
    """Min-K%++: mean of the lowest ``share`` of (l - mean) / deviation; higher = better known.

    Zhang et al. 2024, arXiv 2404.02936, equations 3 and 4. Variances below 1e-6 count as that.
    """
    return _mean_of_lowest((of.log_probs - of.means) / of.deviations, share)


def zlib_ratio(of: Predictions, text: str) -> float:
    """Loss over the bytes that zlib needs for the text (Carlini et al. 2021, arXiv 2012.07805).

    Nats per token and byte: it grows smaller with the length of a text.
    """
    return loss(of) / len(zlib.compress(text.encode()))


def figures(of: Predictions) -> dict[str, float]:
    """Every metric here that needs no text, by name."""
    measures = (
        loss, probability, mean_probability, exact_memorization, extraction_strength, min_k,
        min_k_plus_plus,
    )  # fmt: skip
    return {measure.__name__: measure(of) for measure in measures}


def _mean_of_lowest(values: Tensor, share: float) -> float:
    count = max(1, int(len(values) * share))
    return float(values.topk(count, largest=False).values.mean())
