"""Do influence scores foretell what retraining without records does to other losses?

    python benchmarks/influence.py --data ../shared/data                # 25 minutes at most
    python benchmarks/influence.py --data ../shared/data --minutes 90   # all retrainings
    python benchmarks/influence.py --data ../shared/data --quick        # does it run?
    python benchmarks/influence.py --data ../shared/data --keep kept --scores peers.npz

The last judges other libraries' scores beside these: `benchmarks/peers.py --trained` writes them.

A small pretrained GPT-2 is trained on LUME biographies with every gradient captured, then again
from the same start with the same seed, order and batches on random subsets: the others' share of
each step is left out. When the time is up, the retrainings done by then are what is judged by.
Queries are biographies, some of the trained ones (members) and some held out. Each method gives a
score to every pair of record and query; the prediction for a subset is the sum of its records'
scores, and

LDS          rank correlation (Spearman) over subsets of half the records between that sum and the
             query's negative loss: the linear datamodeling score (Park et al. 2023)
leave-k-out  the same over subsets that lack a tenth of the records

averaged over queries, with a 95 % bootstrap interval over them (subsets are held fixed, so an
interval says nothing of other subsets). A member's own presence rules its loss; ``others`` sets
that aside: predictions and losses are taken less their means over the subsets that hold the query,
and over those that do not.

Scores add up η · share · ⟨g, x⟩ over a record's stored exposures, with the query's gradient q taken
at the trained model:
    dot          x = q                               TracIn (Pruthi et al. 2020)
    dot, adam    x = q / √v̂                          the same in the optimizer's scale
    dot, last    x = q, and g at the trained model too: what there is without a store
    cosine       x = q / |q|, g / |g|
    hvp          x = (G + λ)⁻¹ q                     Gauss-Newton matrix, conjugate gradients
    woodbury     x = (√v̂ + λF)⁻¹ q                   empirical Fisher of stored gradients
    activation   x = −Yᵀ H / t                       activations in place of the query's gradient
    norm         |g| whatever the query, random      controls
Tables go to stderr, one line of JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers.utils import logging

from gradstore import Store
from gradstore.evaluate.loss import sample_losses
from gradstore.factored import FactoredGradient
from gradstore.influence.activation import activations
from gradstore.influence.curvature import GaussNewton
from gradstore.influence.hvp import solve
from gradstore.influence.woodbury import woodbury
from gradstore.training.corpus import read_corpus, tokenize
from gradstore.training.ingest import CaptureSettings, TrainingSettings, ingest, train
from gradstore.training.model import load_model, load_tokenizer
from gradstore.unlearn.controls import fresh
from gradstore.unlearn.exposures import stored

LENGTH = 128  # tokens; longer texts are cut
BOOTSTRAPS = 2000
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    people: int = 80
    queries: int = 12  # members, and as many held out
    halves: int = 40
    tenths: int = 20
    epochs: int = 6
    curved: int = 16  # records that curvature is taken over by products
    fisher: int = 40  # records whose stored gradients make up F
    iterations: int = 12  # of conjugate gradients
    damping: float = 0.1  # λ of hvp ÷ the mean of qᵀGq / qᵀq over queries
    strength: float = 1.0  # of F: 1 halves a gradient of F on its own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    data = os.environ.get("GRADSTORE_REAL_DATA")
    parser.add_argument("--data", type=Path, default=data, required=not data)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=25.0, help="start no retraining after")
    parser.add_argument("--quick", action="store_true", help="too few retrainings to tell methods")
    parser.add_argument(
        "--keep", type=Path, help="folder of trainings and scores that are not reckoned again"
    )
    parser.add_argument("--scores", type=Path, help="scores (records, queries) of others, as .npz")
    options = parser.parse_args()
    plan = Plan()
    if options.quick:
        plan = Plan(people=20, queries=4, halves=6, tenths=3, epochs=2, curved=4, fisher=8)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(stderr=True, width=max(100, Console(stderr=True).width))
    with tempfile.TemporaryDirectory(prefix="influence-") as folder:
        until = time.monotonic() + 60 * options.minutes
        if options.keep:
            folder = options.keep / f"{plan.people}-{plan.epochs}-{options.seed}"
        others = dict(np.load(options.scores)) if options.scores else {}
        result = measure(plan, options.data, Path(folder), options.seed, until, console, others)
    print(json.dumps({"benchmark": "influence", "seed": options.seed, **asdict(plan), **result}))


def asked(plan: Plan, data: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tokens by id: of the records trained on, and of the queries, members before held out."""
    texts = read_corpus(data / "lume" / "people.jsonl")[: plan.people + plan.queries]
    everyone = tokenize(texts, load_tokenizer(data / "tiny_gpt2"), LENGTH, truncate=True)
    ids = list(everyone)
    of_members = ids[: plan.people : plan.people // plan.queries][: plan.queries]
    trained, queries = ids[: plan.people], of_members + ids[plan.people :]
    return {id: everyone[id] for id in trained}, {id: everyone[id] for id in queries}


def measure(
    plan: Plan,
    data: Path,
    folder: Path,
    seed: int,
    until: float,
    console: Console,
    others: Mapping[str, Scores],
) -> dict[str, Any]:
    tokenizer = load_tokenizer(data / "tiny_gpt2")
    trained, by_id = asked(plan, data)
    queries = list(by_id.values())
    settings = TrainingSettings(epochs=plan.epochs, batch_size=8, learning_rate=1e-3, seed=seed)

    begun, start = time.monotonic(), data / "tiny_gpt2"
    if (folder / "trained").exists():
        store = Store.open(folder / "store")
    else:
        store = Store.create(folder / "store")
        ingest(
            store, load_model(start), tokenizer, trained, folder / "trained", settings,
            CaptureSettings(epochs_captured="all"),
        )  # fmt: skip
    network = load_model(folder / "trained")
    seconds = {"training with capture": time.monotonic() - begun}
    losses = {
        "untrained": mean_losses(load_model(start), queries, plan.queries),
        "trained": mean_losses(network, queries, plan.queries),
    }
    console.print("losses of members and held out:", losses)

    done = folder / "scores.npz"
    if done.exists():
        scores, costs, residuals = dict(np.load(done)), dict[str, float](), list[float]()
    else:
        scores, costs, residuals = score(plan, store, network, trained, queries, seed, console)
        np.savez(done, **scores)  # type: ignore[arg-type]
    scores |= {name: of.astype(np.float64) for name, of in others.items()}
    subsets, outcomes, begun = drawn(plan, seed), [], time.monotonic()
    for number, kept in enumerate(subsets):
        if number > 5 and time.monotonic() > until:
            break
        done = folder / f"without-{number}.npy"
        if not done.exists():
            again = load_model(start)
            without = [sample for sample, here in zip(trained, kept, strict=True) if not here]
            train(again, trained, folder / "again", settings, without=without)
            np.save(done, sample_losses(again, queries).double().numpy())
        outcomes.append(-np.load(done))
        each = (time.monotonic() - begun) / (number + 1)
        console.print(f"retrained {number + 1} of {len(subsets)}, {each:.1f} s each")
    subsets = subsets[: len(outcomes)]
    seconds |= {"retraining, each": each, **costs}
    own = np.zeros((plan.people, len(queries)), dtype=bool)
    own[[list(trained).index(id) for id in list(by_id)[: plan.queries]], range(plan.queries)] = True
    rows = judge(plan, scores, np.array(outcomes), subsets, own, seed, list(others))
    table = Table(*rows[0], title="rank correlation of prediction and retraining [95 %]")
    for row in rows:
        table.add_row(*(told(cell) for cell in row.values()))
    console.print(table)
    console.print("seconds:", {what: round(took, 2) for what, took in seconds.items()})
    return {
        "retrained": len(outcomes),
        "losses": losses,
        "seconds": seconds,
        "hvp_residuals": residuals,
        "results": rows,
    }


def score(
    plan: Plan,
    store: Store,
    network: nn.Module,
    trained: Mapping[str, Tensor],
    queries: Sequence[Tensor],
    seed: int,
    console: Console,
) -> tuple[dict[str, Scores], dict[str, float], list[float]]:
    """Scores (records, queries) by method, positive where a record helped; seconds; residuals."""
    run = store.run()
    numbers = store.resolve(trained)
    shape, seconds = (store.model.vocabulary, store.model.width), dict[str, float]()
    applied, unit, norms = (torch.zeros(len(numbers), shape[0] * shape[1]) for _ in range(3))
    norms, last = norms[:, 0], dict[str, FactoredGradient]()
    at = {sample: row for row, sample in enumerate(trained)}
    begun = time.monotonic()
    for met in stored(store, run, list(numbers.values())):
        row, dense = at[met.id], met.gradients["embedding"].dense().flatten()
        applied[row] += met.learning_rate * met.share * dense
        unit[row] += met.learning_rate * met.share * dense / dense.norm()
        norms[row] += met.learning_rate * met.share * dense.norm()
        last[met.id] = met.gradients["embedding"]
    seconds["reading the store"] = time.monotonic() - begun
    kept = store.moments(run["run_id"], "embedding", "end")
    assert kept is not None
    root = (kept[0] / (1 - run["beta2"] ** kept[1])).sqrt() + run["epsilon"]

    def timed(method: str, direction: Callable[[int], Tensor], rows: Tensor = applied) -> Scores:
        begun = time.monotonic()
        x = torch.stack([direction(at).flatten() for at in range(len(queries))])
        out = (rows @ x.T).double().numpy()
        seconds[f"{method}, a query"] = (time.monotonic() - begun) / len(queries)
        console.print(f"scored by {method}")
        return out

    last_alone = torch.stack([fresh(network, [of]).flatten() for of in trained.values()])
    q = [fresh(network, [tokens]) / (len(tokens) - 1) for tokens in queries]
    some = list(trained.values())[:: plan.people // plan.curved][: plan.curved]
    curvature = GaussNewton(network, some)
    bends = [float((each * curvature(each)).sum() / each.square().sum()) for each in q[::4]]
    damping = plan.damping * sum(bends) / len(bends)
    gradients = list(last.values())[:: plan.people // plan.fisher][: plan.fisher]
    sizes = [float((each.dense().square() / root).sum()) for each in gradients]
    strength = plan.strength * len(sizes) / (sum(sizes) / len(sizes))
    residuals: list[float] = []

    def by_products(at: int) -> Tensor:
        solved = solve(curvature, q[at], damping, iterations=plan.iterations)
        residuals.append(solved.residual)
        return solved.x

    shuffled = torch.randn(len(trained), len(queries), generator=torch.Generator().manual_seed(1))
    scores = {
        "dot": timed("dot", lambda at: q[at]),
        "dot, adam": timed("dot, adam", lambda at: q[at] / root),
        "dot, last": timed("dot, last", lambda at: q[at], last_alone),
        "cosine": timed("cosine", lambda at: q[at] / q[at].norm(), unit),
        "hvp": timed("hvp", by_products),
        "woodbury": timed("woodbury", lambda at: woodbury(gradients, q[at], root, strength)),
        "activation": timed("activation", lambda at: activations(network, [queries[at]]).dense()),
        "norm": norms[:, None].expand(-1, len(queries)).double().numpy(),
        "random": shuffled.double().numpy(),
    }
    console.print(f"hvp: λ {damping:.3g}, residuals {min(residuals):.2g} to {max(residuals):.2g}")
    return scores, seconds, residuals


def drawn(plan: Plan, seed: int) -> NDArray[np.bool_]:
    """Which records each subset keeps: half of them, or all but a tenth; in mixed order."""
    draw, rows = random.Random(seed), []
    sizes = [plan.people // 2] * plan.halves + [plan.people // 10] * plan.tenths
    for size in draw.sample(sizes, len(sizes)):
        row = np.ones(plan.people, dtype=bool)
        row[draw.sample(range(plan.people), size)] = False
        rows.append(row)
    return np.array(rows)


def judge(
    plan: Plan,
    scores: Mapping[str, Scores],
    actual: Scores,
    subsets: NDArray[np.bool_],
    own: NDArray[np.bool_],
    seed: int,
    others: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """A row for each method: mean over queries, and its interval, of each measure.

    Last, what the LDS of held-out queries is above that of the best of ``others``, by query.
    """
    halves = subsets.sum(1) == plan.people - plan.people // 2
    tenths = ~halves
    members, held_out = slice(0, plan.queries), slice(plan.queries, None)
    present = (subsets.astype(int) @ own.astype(int)).astype(bool)
    nothing = np.zeros_like(present)
    rows, by_query = [], dict[str, NDArray[np.float64]]()
    for method, of in scores.items():
        row: dict[str, Any] = {"method": method}
        predicted = subsets.astype(float) @ of
        for name, which, over, less in (
            ("LDS held out", held_out, halves, nothing),
            ("LDS members", members, halves, nothing),
            ("LDS others", members, halves, present),
            ("leave-k-out held out", held_out, tenths, nothing),
            ("leave-k-out members", members, tenths, nothing),
        ):
            found = [
                spearman(*(within(x[over, query], less[over, query]) for x in (predicted, actual)))
                for query in range(len(own[0]))[which]
            ]
            row[name] = interval(found, seed)
            by_query.setdefault(method, np.array(found))
        rows.append(row)
    if others:
        best = max(others, key=lambda method: float(by_query[method].mean()))
        for row in rows:
            row[f"less {best}"] = interval(list(by_query[row["method"]] - by_query[best]), seed)
    return rows


def within(x: Scores, group: NDArray[np.bool_]) -> Scores:
    """``x`` less its mean in either group."""
    out = x.copy()
    for members in (group, ~group):
        if members.any():
            out[members] -= x[members].mean()
    return out


def spearman(a: Scores, b: Scores) -> float:
    """Rank correlation; none where one of them is constant."""
    ranks = [np.unique(x, return_inverse=True, return_counts=True) for x in (a, b)]
    first, second = ((np.cumsum(n) - n / 2)[at] for _, at, n in ranks)  # ties share a rank
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def interval(found: Sequence[float], seed: int) -> dict[str, float]:
    """The mean, and the 2.5th and 97.5th percentile of means of resampled queries."""
    draw = np.random.default_rng(seed)
    means = draw.choice(np.array(found), (BOOTSTRAPS, len(found))).mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return {"mean": float(np.mean(found)), "low": float(low), "high": float(high)}


def mean_losses(network: nn.Module, queries: Sequence[Tensor], members: int) -> dict[str, float]:
    losses = sample_losses(network, queries)
    return {"members": float(losses[:members].mean()), "held out": float(losses[members:].mean())}


def told(cell: Any) -> str:
    if isinstance(cell, str):
        return cell
    return f"{cell['mean']:+.2f} [{cell['low']:+.2f}, {cell['high']:+.2f}]"


if __name__ == "__main__":
    main()
