"""Where a request raised the loss, token by token, and where training had lowered it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradstore.store.catalog import Columns
from gradstore.unlearn.request import Subject

_LEAST_PROBABILITY = 2.0**-11  # that half precision tells from 0 when it keeps p − 1


def columns_of(
    subject: Subject, before: Sequence[Tensor], after: Sequence[Tensor] | None
) -> Columns:
    """Rows of ``token_losses`` of a subject's samples, from their tokens' losses before and after.

    What a token's loss was when training first met it is told by its probability in the stored
    output side: R at the label is that probability less one.
    """
    first: dict[str, Tensor] = {}
    for record in subject.store.records(
        list(subject.samples.values()), subject.run["run_id"], first_only=True
    ):
        if record.output is not None:
            p = 1 + record.output.label.float()
            nats = -p.clamp(min=_LEAST_PROBABILITY).log()
            first[record.exposure.id] = nats.where(record.scored, torch.nan)
    table: dict[str, list[Any]] = {
        name: [] for name in ("sample_id", "position", "before", "after", "first_met")
    }
    for place, (sample, number) in enumerate(subject.samples.items()):
        count = len(before[place])
        met = first.get(sample)
        table["sample_id"] += [number] * count
        table["position"] += range(1, count + 1)
        table["before"] += before[place].tolist()
        table["after"] += [None] * count if after is None else after[place].tolist()
        table["first_met"] += (
            [None] * count if met is None else [None if x != x else x for x in met.tolist()]
        )
    return table
