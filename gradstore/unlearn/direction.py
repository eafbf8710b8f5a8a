"""Which way to move the embedding so that samples are forgotten."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradstore.errors import ForgetError
from gradstore.store.record import Record
from gradstore.store.store import Store

DIRECTIONS = ("applied", "raw", "fresh", "random")
WEIGHTS = ("rising", "uniform")
Kind = Literal["applied", "raw", "fresh", "random"]


@dataclass(frozen=True)
class Direction:
    """``update`` (V, d): adding α times it to the embedding raises the samples' loss.

    ``natural`` says whether α has a scale of its own: 1 is about what the optimizer's steps were.
    """

    kind: Kind
    update: Float[Tensor, "V d"]
    natural: bool
    exposures: int


def raw(store: Store, run: dict[str, Any], sample_ids: Sequence[int]) -> Direction:
    """The sum of the samples' first stored gradients: ascent as in arXiv 2406.09391.

    The gradient is of each sample's summed loss; the step's length means nothing, so it needs a
    target. Both sides of a tied embedding, where they are stored.
    """
    update, seen = torch.zeros(store.model.vocabulary, store.model.width), set()
    for record in _records(store, run, sample_ids):
        if record.exposure.id not in seen:
            seen.add(record.exposure.id)
            record.gradient(store.model).add_to(update)
    return Direction("raw", update, False, len(seen))


def applied(
    store: Store, run: dict[str, Any], sample_ids: Sequence[int], weights: str = "rising"
) -> Direction:
    """What the samples made the optimizer do, with its sign turned: Σ w · η · share · g / √v.

    The sum is over the stored exposures; η is the learning rate at each, ``share`` what the
    sample's summed loss counted in the batch, after clipping; v Adam's second moment at the end of
    the run (1 for SGD). ``rising`` weights w = epoch / mean epoch: training has washed out early
    steps most. Raises :class:`ForgetError` for an optimizer that is neither Adam nor SGD.

    v is taken as Adam keeps it, without its bias correction: the direction is longer than what was
    applied in runs shorter than 1/(1 − β₂) steps. The default dose was found that way, with
    β₂ = .999 and a few hundred steps; a smaller β₂ or a longer run would take rather more.
    """
    divisor = _root_of_second_moment(store, run)
    by_sample: dict[str, list[Record]] = defaultdict(list)
    for record in _records(store, run, sample_ids):
        by_sample[record.exposure.id].append(record)
    update, count = torch.zeros(store.model.vocabulary, store.model.width), 0
    for records in by_sample.values():
        mean_epoch = sum(r.exposure.epoch for r in records) / len(records)
        for record in records:
            met = record.exposure
            weight = met.epoch / mean_epoch if weights == "rising" else 1.0
            scale = weight * met.learning_rate * met.batch_share * met.grad_scale
            record.gradient(store.model).add_to(update, scale)
            count += 1
    return Direction("applied", update / divisor, True, count)


def _records(store: Store, run: dict[str, Any], sample_ids: Sequence[int]) -> list[Record]:
    records = list(store.records(sample_ids, run["run_id"]))
    held = {record.exposure.id for record in records}
    for sample in store.rows(
        "SELECT id FROM samples WHERE list_contains(?, sample_id)", [list(sample_ids)]
    ):
        if sample[0] not in held:
            raise ForgetError(
                f"{sample[0]!r} has no gradient in {run['name']}: it was held out or never met; "
                f"see `gradstore show {sample[0]}`"
            )
    return records


def _root_of_second_moment(store: Store, run: dict[str, Any]) -> Tensor | float:
    kept = store.moments(run["run_id"], "embedding", "end")
    if kept is None:
        if run["optimizer"] == "SGD":
            return 1.0
        raise ForgetError(
            f"{run['name']} kept no second moments of {run['optimizer']} at its end, so what it "
            "applied is not known (an unfinished run, or an optimizer that is neither Adam nor "
            "SGD); use --direction raw"
        )
    root: Tensor = kept[0].sqrt() + run["epsilon"]
    return root
