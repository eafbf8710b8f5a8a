"""A query's gradient bent by the curvature of what a run trained on, before records meet it.

A dot product tells what the steps on a record took off the query's loss; but training on everything
else took part in both. Influence functions (Koh and Liang 2017, arXiv 1703.04730) ask instead how
the optimum moves without the record, ⟨g, (H + λ)⁻¹ q⟩. The solved query is one dense matrix, so
records are scanned as fast as for any other.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradstore.errors import ForgetError, InfluenceError
from gradstore.factored import FactoredGradient, Term
from gradstore.influence.curvature import GaussNewton
from gradstore.influence.hvp import solve
from gradstore.influence.query import Query
from gradstore.influence.scale import root_of_second_moment
from gradstore.influence.woodbury import woodbury
from gradstore.store.record import Sides
from gradstore.store.store import Store

CURVED, FISHER = 32, 64  # records that the curvature is taken over: by products, by gradients
DAMPING = 0.1  # λ over the mean curvature along the query
ITERATIONS, TOLERANCE = 20, 0.05  # of conjugate gradients: the most, and the residual to stop at


def by_products(
    store: Store, run: Mapping[str, Any], query: Query, network: nn.Module, seed: int = 0
) -> Query:
    """(G + λ)⁻¹ q, G the Gauss-Newton matrix of ``CURVED`` records of the run at ``network``.

    By conjugate gradients (Martens 2010); λ is ``DAMPING`` · qᵀGq / qᵀq, and what they left of the
    query, |(G + λ)x − q| ÷ |q|, its ``residual``. The query's gradient must be one taken at that
    checkpoint. Raises :class:`InfluenceError` for another, or a model without forward derivatives.
    """
    q = _at_checkpoint(query).dense()
    tokens = store.tokens(_drawn(store, run, CURVED, seed), run["run_id"])
    curvature = GaussNewton(network, list(tokens.values()))
    device = next(network.parameters()).device
    q = q.to(device)
    try:
        bent = curvature(q)
    except ForgetError as error:
        raise InfluenceError(
            f"{type(network).__name__} has no forward derivative ({error.__cause__}); "
            "give --method newton, which needs none"
        ) from error
    damping = DAMPING * float((q * bent).sum() / q.square().sum())
    if not damping > 0:
        raise InfluenceError("the curvature along the query is nought: its loss is at its least")
    solution = solve(curvature, q, damping, iterations=ITERATIONS, tolerance=TOLERANCE)
    return replace(
        query,
        gradients={None: _as_gradient(solution.x.cpu())},
        replaced="hvp",
        damping=damping,
        residual=solution.residual,
    )


def by_fisher(store: Store, run: Mapping[str, Any], query: Query, seed: int = 0) -> Query:
    """(√v̂ + λF)⁻¹ q, F the empirical Fisher matrix of the last stored gradients of ``FISHER``.

    By Woodbury's identity, exact; √v̂ is the optimizer's scale at the end of the run (1 for SGD). λ
    makes a gradient of F as firm on its own as that scale: Σᵢ λ|gᵢ|²/n² = 1 in its metric.
    """
    q = _at_checkpoint(query).dense()
    sides: Sides | None = None if store.model.tied else "input"
    last = {
        record.exposure.id: record.gradient(store.model, sides=sides)
        for record in store.records(_drawn(store, run, FISHER, seed), run["run_id"])
    }
    scale: Tensor | float = 1.0
    if (known := root_of_second_moment(store, run)) is not None:
        scale = known[0] + (known[1] or 1e-8)
    sizes = [float((gradient.dense().square() / scale).sum()) for gradient in last.values()]
    damping = len(sizes) ** 2 / sum(sizes)
    x = woodbury(list(last.values()), q, scale, damping)
    return replace(
        query, gradients={None: _as_gradient(x)}, replaced="newton", damping=damping, residual=0.0
    )


def _at_checkpoint(query: Query) -> FactoredGradient:
    gradient = query.gradients.get(None)
    if gradient is None:
        raise InfluenceError(
            "curvature is that of one checkpoint, and so must the query's gradient be: name it "
            "with --model"
        )
    return gradient


def _as_gradient(x: Float[Tensor, "V d"]) -> FactoredGradient:
    return FactoredGradient([Term.one_hot(torch.arange(len(x)), x)], (x.shape[0], x.shape[1]))


def _drawn(store: Store, run: Mapping[str, Any], count: int, seed: int) -> list[int]:
    rows = store.rows(
        "SELECT DISTINCT sample_id FROM exposures WHERE run_id = ? ORDER BY sample_id",
        [run["run_id"]],
    )
    numbers = [number for (number,) in rows]
    return sorted(random.Random(seed).sample(numbers, min(count, len(numbers))))
