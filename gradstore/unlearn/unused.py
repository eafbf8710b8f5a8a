"""Tokens that only the forgotten contain: what their rows would be, had nobody used them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradstore.capture.layers import OF_TOKENS, parameter
from gradstore.store.store import Store

RIDGE = 0.1  # times the variance of an entry of the rows
FEW = 32  # rows tell too little
ENOUGH = 4  # times the width: more rows cost time and tell no more

Tokens = tuple[Int[Tensor, " m"], Int[Tensor, " n"]]


def as_if_unused(
    store: Store,
    run: Mapping[str, Any],
    network: nn.Module,
    updates: Mapping[str, Float[Tensor, "V d"]],
    tokens: Tokens,
) -> tuple[dict[str, Float[Tensor, "V d"]], int]:
    """Updates that bring rows which only some samples used to where they would be without them.

    ``tokens`` are those that :func:`tokens_of` finds. Returns the updates with the number of such
    tokens, 0 where nothing can be told: no token is theirs alone, the run kept no start, or fewer
    than ``FEW`` tokens stand in no record at all. Undoing their steps is not enough there. Each
    prediction of another token pushes such a row away, ever so little, but Adam divides by the root
    of its second moment: where that is the forgotten's own work the others' push counted for
    little, and without them it would have counted in full.
    """
    own, unused = tokens
    result, done = dict(updates), 0
    for name in OF_TOKENS:
        kept = store.moments(run["run_id"], name, "start") if name in updates else None
        if kept is None or not len(own) or len(unused) < FEW:
            continue
        start, now = kept[0], parameter(network, name).detach().float().cpu()
        some = unused[:: max(1, len(unused) // (ENOUGH * start.shape[1]))]
        result[name] = updates[name].clone()
        result[name][own] = start[own] + drift(start, now, some, own) - now[own]
        done = len(own)
    return result, done


def drift(
    start: Float[Tensor, "V d"],
    now: Float[Tensor, "V d"],
    unused: Int[Tensor, " n"],
    rows: Int[Tensor, " m"],
) -> Float[Tensor, "m d"]:
    """How far training would have moved ``rows`` had nobody used them, as it did the ``unused``.

    A ridge regression of the unused rows' displacement on where they began: what pushes a row away
    is how probable it is, which its start decides.
    """
    x, y = start[unused].double(), (now - start)[unused].double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    spread = x.var().clamp_min(torch.finfo(x.dtype).eps)  # rows may all begin alike
    damping = RIDGE * len(x) * spread * torch.eye(x.shape[1], dtype=x.dtype)
    slope = torch.linalg.solve(x.T @ x + damping, x.T @ y)
    expected: Tensor = y_mean + (start[rows].double() - x_mean) @ slope
    return expected.to(start.dtype)


def tokens_of(
    store: Store, run: Mapping[str, Any], sample_ids: Collection[int], gone: Collection[int] = ()
) -> Tokens:
    """Tokens that stand in some samples and in no other of the run, and those that stand nowhere.

    Samples that are ``gone``, because the model has forgotten them before, are no others, but their
    tokens are not unused. Reads the token ids of all that the run stored.
    """
    where = torch.zeros(3, store.model.vocabulary, dtype=torch.bool)  # others', theirs, gone ones'
    places = store.rows(
        """SELECT segment_id, list([token_start, token_start + "rows" + 1, owner])
                  FILTER (owner > 0)
           FROM (SELECT *, CASE WHEN list_contains($1, sample_id) THEN 1
                                WHEN list_contains($2, sample_id) THEN 2 ELSE 0 END AS owner
                 FROM exposures WHERE run_id = $3) GROUP BY segment_id""",
        [list(sample_ids), list(gone), run["run_id"]],
    )
    for segment, ranges in places:
        tokens = store.segment(segment).tensor("tokens").long()
        owner = torch.zeros_like(tokens)
        for start, stop, whose in ranges or ():
            owner[start:stop] = whose
        where[owner, tokens] = True
    others, theirs, _ = where
    return (theirs & ~others).nonzero()[:, 0], (~where.any(0)).nonzero()[:, 0]
