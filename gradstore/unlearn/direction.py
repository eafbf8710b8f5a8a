"""What a direction is, and the plainest: the sum of first gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradstore.store.store import Store
from gradstore.unlearn.exposures import records

DIRECTIONS = ("applied", "newton", "orthogonal", "raw", "fresh", "random")
Kind = Literal["applied", "newton", "orthogonal", "raw", "fresh", "random"]


@dataclass(frozen=True)
class Direction:
    """``updates`` (V, d): adding α times them to the weights they name raises the samples' loss.

    A weight is ``embedding``, or another that :meth:`Record.gradients` names.
    ``dose`` is the α it is made for, None if its length means nothing; ``weights`` what exposures
    were weighted by, None where there is one of each sample; ``alone`` counts the tokens that only
    the samples contain, whose rows go where they would be had nobody used them.
    """

    kind: Kind
    updates: Mapping[str, Float[Tensor, "V d"]]
    dose: float | None
    exposures: int
    weights: str | None = None
    alone: int = 0

    @property
    def update(self) -> Float[Tensor, "V d"]:
        """That of the embedding."""
        return self.updates["embedding"]


def raw(
    store: Store,
    run: dict[str, Any],
    sample_ids: Sequence[int],
    layers: Sequence[str] = ("embedding",),
    epochs: str = "first",
) -> Direction:
    """The sum of the samples' first stored gradients: ascent as in arXiv 2406.09391.

    The gradient is of each sample's summed loss; the step's length means nothing, so it needs a
    target. Both sides of a tied embedding, where they are stored. ``epochs`` sums others than the
    first stored one.
    """
    updates: dict[str, Tensor] = {}
    met = records(store, run, sample_ids, epochs)
    for record in met:
        for name, gradient in record.gradients(store.model, layers).items():
            gradient.add_to(updates.setdefault(name, torch.zeros(gradient.shape)))
    return Direction("raw", updates, None, len(met))
