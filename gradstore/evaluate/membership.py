"""Scores of membership that take more than one forward pass of one model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gradstore.evaluate.audience import Audience
from gradstore.influence.query import gradient_of

Array = NDArray[np.float64]


def gradnorms(model: Any, samples: Sequence[Tensor]) -> Array:
    """‖∂ loss / ∂ embedding‖ of each sample, smaller for better known ones; (n,), nats.

    The Frobenius norm of the gradient of the sample's mean loss per token (its first token apart)
    with respect to the token embedding, both of its sides where the head is tied; without dropout.
    ``samples`` are 1-D token ids, at least two each. OpenUnlearning's gradnorm (arXiv 2506.12618)
    takes the mean of such norms over all parameters, and leaves dropout on.
    """
    return np.array([gradient_of(model, each).norm() / (len(each) - 1) for each in samples])


def gradnorms_of(model: Any, audience: Audience) -> Array:
    """:func:`gradnorms` of the forgotten and the held-out, NaN elsewhere; (n,).

    Membership is told by these, and a backward pass each is too dear for all.
    """
    places = audience.of("forget") + audience.of("holdout")
    values = np.full(len(audience.members), math.nan)
    values[places] = gradnorms(model, [audience.tokens[at] for at in places])
    return values


def above_reference(losses: Array, theirs: Array) -> Array:
    """Loss less the reference's loss on the same sample, smaller for members; (n,), nats per token.

    What makes a text hard for both cancels: of two texts with one loss the one that a model without
    it finds harder is likelier to be known (calibrated by difficulty, Watson et al. 2022, arXiv
    2111.08440).
    """
    return losses - theirs
