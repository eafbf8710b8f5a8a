"""What the gradient at the head tells about every sample of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradstore.capture import compact
from gradstore.capture.taps import Pass
from gradstore.errors import CaptureError

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of a share; half precisions: 5 %


@dataclass(frozen=True)
class HeadFacts:
    """Measured when the head's gradient arrives, for B samples of S positions.

    ``exact`` is the first sample's full R, kept now and then to measure what compaction loses.
    """

    real: Bool[Tensor, "b s"]
    scored: Bool[Tensor, "b s"]
    share: Float[Tensor, " b"]
    loss: Float[Tensor, " b"]
    output: compact.CompactOutput | None
    exact: Float[Tensor, "s V"] | None


def measure_head(
    one: Pass, gradient: Float[Tensor, "b s V"], top_k: int | None, keep_exact: bool
) -> HeadFacts:
    """Shares, losses and, with ``top_k``, the compact output side of one pass.

    Raises :class:`CaptureError` where the loss is not next-token cross-entropy.
    """
    assert one.tokens is not None
    assert one.logits is not None
    batch, length, _ = gradient.shape
    at_loss = gradient if one.logits_gradient is None else one.logits_gradient
    real = torch.ones_like(one.tokens, dtype=torch.bool)
    if one.mask is not None and one.mask.shape == one.tokens.shape:
        real = one.mask.bool()
    labels, has_next = compact.next_tokens(one.tokens, real)
    at = compact.position_facts(one.logits.flatten(0, 1), at_loss.flatten(0, 1), labels.flatten())
    by_position, weight = at.share.view(batch, length), at.weight.view(batch, length)
    if one.labels is None:  # the loss was taken outside the model
        scored = has_next & (weight != 0)
    else:
        target = torch.roll(one.labels, -1, dims=1)
        scored = has_next & (target != -100)
        if bool((scored & (target != labels)).any()):
            raise CaptureError(
                "labels differ from the inputs; gradstore captures next-token losses, where "
                "labels are the input ids, or -100 for positions that do not count"
            )
    weight = torch.where(scored, weight, 0.0)
    share = (weight * by_position).sum(1) / weight.sum(1).clamp(min=1e-30)
    loss = torch.where(scored, at.loss.view(batch, length), 0.0).sum(1) / scored.sum(1)
    _check(one, at_loss.dtype, weight != 0, by_position, share, at.pulled.view(batch, length))
    output = None
    if top_k is not None:
        flat = gradient.flatten(0, 1)
        output = compact.compact(
            flat,
            labels.flatten(),
            torch.where(scored, share[:, None], 0.0).flatten(),
            top_k,
            None if one.same_logits else flat.float().sum(1),
        )
    exact = None
    if keep_exact:
        exact = gradient[0].float() * torch.where(share[0] > 0, 1 / share[0], 0.0)
    return HeadFacts(real, scored, share, loss, output, exact)


def _check(
    one: Pass, dtype: torch.dtype, known: Tensor, by_position: Tensor, share: Tensor, pulled: Tensor
) -> None:
    """Raise unless, where it is known, the gradient is the share times a cross-entropy's."""
    off = (by_position - share[:, None]).abs() > _TOLERANCE.get(dtype, 0.05) * share[:, None]
    positive = (by_position > 0) & torch.isfinite(by_position)
    if not bool((known & (off | ~positive | ~pulled)).any()):
        return
    assert one.logits is not None
    broken = ~torch.isfinite(one.logits).flatten(1).all(1)
    if bool(broken.any()):
        sample = one.ids[int(broken.int().argmax())]
        raise CaptureError(
            f"the loss of sample {sample!r} is NaN: training has diverged. Lower the learning rate "
            "or clip gradients; what was captured before this step is kept"
        )
    raise CaptureError(
        "the loss is not the cross-entropy of the next token (label smoothing, another objective, "
        "shifted labels?), so its gradients have no scale of their own"
    )
