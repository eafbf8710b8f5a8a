"""The optimizer's second moments of the captured weights: what its steps were divided by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradstore.errors import CaptureError


def second_moments(
    optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Adam's ``exp_avg_sq`` of each weight, float32; empty for optimizers without one."""
    kept = {}
    for layer, weight in weights.items():
        moment = optimizer.state.get(weight, {}).get("exp_avg_sq")
        if isinstance(moment, Tensor) and moment.shape == weight.shape:
            kept[layer] = moment.detach().float().cpu()
    return kept


def group_of(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, what: str = "the model's embedding"
) -> dict[str, Any]:
    """The optimizer's parameter group that trains ``weight``."""
    for group in optimizer.param_groups:
        if any(parameter is weight for parameter in group["params"]):
            return group
    raise CaptureError(
        f"the optimizer does not train {what}; make the optimizer from this very model's "
        "parameters before capturing"
    )
