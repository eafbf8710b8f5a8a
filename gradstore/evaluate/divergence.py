"""How far models' predictions are from each other: Kullback-Leibler divergence, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from gradstore.evaluate.statistics import Estimate, estimate, ratio

FEW = 8  # records; of fewer, tokens are drawn instead

Divergences = list[Float[Tensor, " n"]]


@torch.no_grad()
def divergences(one: nn.Module, other: nn.Module, samples: Sequence[Tensor]) -> Divergences:
    """KL(one ‖ other) at each of a sample's n = t - 1 predictions, in nats; float64 on the CPU.

    ``samples`` are 1-D token ids; both models are evaluated without dropout and left in their mode.
    """
    modes = one.training, other.training
    one.eval(), other.eval()
    found = []
    for tokens in samples:
        p, q = (
            model(input_ids=tokens[None].long().to(next(model.parameters()).device))
            .logits[0, :-1]
            .float()
            .log_softmax(-1)
            .cpu()
            for model in (one, other)
        )
        terms = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0)
        found.append(terms.sum(-1).double())
    one.train(modes[0]), other.train(modes[1])
    return found


def per_token(of: Divergences) -> Estimate:
    """The mean over all tokens of all samples; records are drawn, or tokens of fewer than eight."""
    return estimate(ratio, _rows(of))


def nearer(to_reference: Divergences, to_original: Divergences) -> Estimate:
    """Mean per token of what ``to_reference`` is more than ``to_original``: below 0 if nearer.

    A relative test of three models (after Bounliphone et al. 2016, arXiv 1511.04581): both
    divergences are those to the model in question, on the same tokens. The bootstrap is paired: it
    draws records with both their divergences, or tokens of fewer than eight records, which ignores
    that tokens of one record go together.
    """
    pairs = zip(to_reference, to_original, strict=True)
    return estimate(ratio, _rows([one - other for one, other in pairs]))


def excess(forgotten: Divergences, held_out: Divergences) -> Estimate:
    """How much further apart two models are on the forgotten than on held-out records, per token.

    Of reference and original: what there is to forget. Where the interval reaches 0 they hardly
    differ there, and every method looks perfect.
    """
    rows = _rows(forgotten), _rows(held_out)
    return estimate(lambda here, elsewhere: ratio(here) - ratio(elsewhere), *rows)


def _rows(of: Divergences) -> NDArray[np.float64]:
    """(sum, count) of each record, or of each token where records are few."""
    parts = of if len(of) >= FEW else torch.cat(of).split(1)
    return np.array([(float(part.sum()), len(part)) for part in parts])
