"""The optimizer's own scale: what Adam divided a step by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gradstore.store.store import Store


def root_of_second_moment(
    store: Store, run: Mapping[str, Any], layer: str = "embedding"
) -> tuple[Tensor, float] | None:
    """√v̂ of a layer at the end of a run, bias-corrected (Kingma and Ba 2015, eq. 1), and ε.

    None where the run kept no second moments: SGD has none, an unfinished run not yet.
    """
    kept = store.moments(run["run_id"], layer, "end")
    if kept is None:
        return None
    v, step = kept
    return (v / (1 - (run["beta2"] or 0.0) ** step)).sqrt(), run["epsilon"] or 0.0
