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
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradstore.errors import ForgetError, InfluenceError
from gradstore.factored import FactoredGradient, Term
from gradstore.influence.curvature import GaussNewton, Operator, Solution
from gradstore.influence.hvp import Hessian, largest_eigenvalue, lissa, solve
from gradstore.influence.predictions import flat, parts
from gradstore.influence.query import Bent, Query
from gradstore.influence.scale import root_of_second_moment
from gradstore.influence.woodbury import woodbury
from gradstore.store.record import Sides
from gradstore.store.store import Store

CURVED, FISHER = 32, 64  # records that the curvature is taken over: by products, by gradients
DAMPING = 0.1  # λ over the mean curvature along the query, if no λ is given
ITERATIONS, TOLERANCE = 20, 0.05  # of conjugate gradients: the most, and the residual to stop at
DEPTH = 200  # of LiSSA, whose iterations take off less
_SPARE = 1.1  # over an eigenvalue that is estimated from below

Solver = Literal["cg", "lissa"]
Curvature = Literal["gauss-newton", "hessian"]


def by_products(
    store: Store,
    run: Mapping[str, Any],
    query: Query,
    network: nn.Module,
    seed: int = 0,
    *,
    curvature: Curvature = "gauss-newton",
    solver: Solver = "cg",
    damping: float | None = None,
) -> Query:
    """(H + λ)⁻¹ q, H the ``curvature`` of ``CURVED`` records of the run at ``network``.

    H is the Gauss-Newton matrix or the exact Hessian, λ the ``damping`` or, where none is given,
    ``DAMPING`` · |qᵀHq| / qᵀq. It is solved by conjugate gradients (Martens 2010) or by LiSSA
    (Agarwal et al. 2017). H is of the embedding and of the query's layers, all together. The
    query's gradient must be one taken at that checkpoint. Raises
    :class:`InfluenceError` for another, for a model without forward derivatives, and where solving
    fails: conjugate gradients meet a direction in which H + λ is not positive, LiSSA diverges.
    """
    asked = {"embedding": _at_checkpoint(query).dense(), **query.beside}
    drawn = _drawn(store, run, CURVED, seed)
    samples = list(store.tokens(drawn, run["run_id"]).values())
    matrix = (Hessian if curvature == "hessian" else GaussNewton)(network, samples, asked)
    q = flat(asked).to(next(network.parameters()).device)
    try:
        along = float((q * matrix(q)).sum() / q.square().sum())
    except ForgetError as error:
        raise InfluenceError(
            f"{type(network).__name__} has no forward derivative ({error.__cause__}); "
            "give --method newton, which needs none, or --curvature hessian"
        ) from error
    if damping is None and not abs(along) > 0:
        raise InfluenceError("the curvature along the query is nought: its loss is at its least")
    damping = DAMPING * abs(along) if damping is None else damping
    try:
        solution = _solution(matrix, q, damping, solver)
    except ValueError as error:
        raise InfluenceError(f"with λ {damping:.3g}, {error} (--damping, --curvature)") from error
    bent = Bent(
        curvature, solver, damping, solution.residual, solution.iterations, len(drawn), seed
    )
    beside = parts(solution.x.cpu(), asked)
    gradients: dict[int | None, FactoredGradient] = {None: _as_gradient(beside.pop("embedding"))}
    return replace(query, gradients=gradients, replaced="hvp", bent=bent, beside=beside)


def _solution(matrix: Operator, q: Tensor, damping: float, solver: Solver) -> Solution:
    """Raises ``ValueError`` where there is none, or LiSSA goes away from it."""
    if solver == "cg":
        return solve(matrix, q, damping, iterations=ITERATIONS, tolerance=TOLERANCE)
    scale = _SPARE * (abs(largest_eigenvalue(matrix, q)) + damping)
    solution = lissa(matrix, q, damping, scale=scale, depth=DEPTH, tolerance=TOLERANCE)
    if not solution.residual < 1:
        raise ValueError("LiSSA goes away from the solution: damp it more")
    return solution


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
    bent = Bent("fisher", "woodbury", damping, 0.0, 0, len(last), seed)
    return replace(query, gradients={None: _as_gradient(x)}, replaced="newton", bent=bent)


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
