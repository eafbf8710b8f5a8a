"""How firmly later training held a model: `newton` undoes as much as that let go of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradstore.influence.query import gradient_of
from gradstore.store.store import Store
from gradstore.unlearn.exposures import nearest, saved


def held_after(
    store: Store, run: dict[str, Any], changed: Mapping[int, float] | None = None
) -> dict[int, float]:
    """For each step of a run how firmly the steps after it held the model where it ended.

    Sums their learning rates, times what a step's loss was in units of a mean over tokens, times
    how much larger the squares of gradients (at the embedding's output) were in its epoch than in
    the last. Curvature goes with these (it is their mean where predictions are right on average)
    and shrinks as records are learned. An epoch of which little was captured (less than half as
    much as of another) counts as the one before it of which more was, or the first of these;
    ``changed``, as :func:`sizes` has it, tells how the squares changed in between. Nothing for a
    run that kept no list of its steps.
    """
    known = {
        epoch: (size, tokens)
        for epoch, size, tokens in store.rows(
            """SELECT epoch, avg(d_norm * d_norm) FILTER (isfinite(d_norm)),
                      sum(batch_share * grad_scale * scored_tokens) / count(DISTINCT step)
               FROM exposures WHERE run_id = ? GROUP BY epoch
               QUALIFY 2 * count(*) >= max(count(*)) OVER () ORDER BY epoch""",
            [run["run_id"]],
        )
    }
    if not known or not store.has("steps"):
        return {}

    def seen(epoch: int) -> tuple[float | None, float]:
        """Squares of gradients, and what a step's loss was."""
        captured = max((e for e in known if e <= epoch), default=min(known))
        size, tokens = known[captured]
        if size is not None and changed and changed.get(captured):
            size *= changed.get(epoch, changed[captured]) / changed[captured]
        return size, tokens

    steps = store.rows(
        "SELECT step, epoch, learning_rate FROM steps WHERE run_id = ? ORDER BY step DESC",
        [run["run_id"]],
    )
    of = {epoch: seen(epoch) for epoch in dict.fromkeys(epoch for _, epoch, _ in steps)}
    last = next((size for size, _ in of.values() if size is not None), None)
    after, held = dict[int, float](), 0.0
    for step, epoch, rate in steps:
        size, tokens = of[epoch]
        after[step] = held
        held += rate * tokens * (1.0 if size is None or not last else size / last)
    return after


def counted(
    store: Store, run: dict[str, Any], held: Mapping[int, float], met: Sequence[Sequence[int]]
) -> tuple[float, dict[int, float]]:
    """How long one implicit step has to be for some exposures, and what each step counts in it.

    A step η of the optimizer is left as η · exp(−c_k · λ) in a direction of curvature λ, with c_k
    its ``held``. For ``met``, the steps of each exposure (any of them, equally likely), c is the
    mean of c_k by learning rate; every step of the run is given η · 2 · exp(−c_k / c), with
    which 1 / (1 + c · λ) is exact at λ = 1 / c, and η where c is 0.
    """
    rates = dict(
        store.rows("SELECT step, learning_rate FROM steps WHERE run_id = ?", [run["run_id"]])
    )
    parts = [
        (rates[step] / len(steps), held[step]) for steps in met for step in steps if step in held
    ]
    total = sum(part for part, _ in parts)
    c = sum(part * firm for part, firm in parts) / total if total else 0.0
    if not c:
        return 0.0, rates
    return c, {step: rates[step] * 2 * math.exp(-firm / c) for step, firm in held.items()}


def sizes(
    store: Store, run: dict[str, Any], sample_ids: Sequence[int], checkpoints: Sequence[Path]
) -> dict[int, float]:
    """How large some samples' gradients at the embedding's output were: mean square, by epoch.

    As the catalog has it, or for an epoch that was not captured at the nearest of some
    ``checkpoints``. Samples of which training counted only a part are left out.
    """
    whole = [
        number
        for (number,) in store.rows(
            """SELECT sample_id FROM exposures WHERE run_id = ? AND list_contains(?, sample_id)
               GROUP BY sample_id HAVING bool_and(scored_tokens = "rows") ORDER BY sample_id""",
            [run["run_id"], list(sample_ids)],
        )
    ]
    if not whole:
        return {}
    found = dict(
        store.rows(
            """SELECT epoch, avg(d_norm * d_norm) FROM exposures
               WHERE run_id = ? AND list_contains(?, sample_id) AND isfinite(d_norm)
               GROUP BY epoch""",
            [run["run_id"], whole],
        )
    )
    texts = store.tokens(whole, run["run_id"]).values()
    for checkpoint, epochs in nearest(store, run, checkpoints).items():
        missing = [epoch for epoch, *_ in epochs if epoch not in found]
        if missing:
            network = saved(checkpoint, store)
            terms = [
                term for text in texts for term in gradient_of(network, text, sides="input").terms
            ]
            square = sum(float(term.B.square().sum()) for term in terms) / len(whole)
            found |= dict.fromkeys(missing, square)
    return found
