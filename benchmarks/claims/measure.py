"""One training, its records forgotten along every direction, each held against retraining."""

from __future__ import annotations

import math
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from influence import spearman
from retraining.judges import Judges, divergence, mean_loss
from retraining.setting import retrained, watched
from rich.console import Console
from torch import Tensor

from claims.training import Cell, Profile, Row, Trained, bytes_of, kept, train_cell, weights_of
from gradstore.capture.layers import parameter
from gradstore.evaluate.audience import Audience
from gradstore.evaluate.loss import sample_losses
from gradstore.influence.query import Checkpoint, gradient_of
from gradstore.influence.solved import by_products
from gradstore.influence.top import Settings, influences
from gradstore.training.model import load_model
from gradstore.unlearn.exposures import records
from gradstore.unlearn.find import HELD, find
from gradstore.unlearn.held import Held
from gradstore.unlearn.target import from_undoing
from gradstore.unlearn.walk import Walk

MULTIPLES = (0.0, 0.12, 0.25, 0.37, 0.5, 0.62, 0.75, 0.87, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
DOUBLINGS, HALVINGS = 30, 12


@dataclass(frozen=True)
class Way:
    """Where a direction comes from: its kind, the stored epochs that count, the weights it moves.

    ``side`` is the half of a tied embedding's gradient that is taken.
    """

    kind: str
    epochs: str | None = None
    where: str = "embedding"
    side: str | None = None


def measure(
    cell: Cell, profile: Profile, data: Path | None, keep: Path, console: Console
) -> dict[str, Any]:
    """All rows of a training's records, and bytes stored by array; done once for each ``keep``."""
    folder = keep / f"{cell.text}-{'tied' if cell.tied else 'untied'}-{cell.seed}"
    found: dict[str, Any] = kept(
        folder / "rows.json", lambda: _measured(cell, profile, data, folder, console)
    )
    shutil.rmtree(folder / "store", ignore_errors=True)  # gigabytes; what was measured stays
    return found


def _measured(
    cell: Cell, profile: Profile, data: Path | None, folder: Path, console: Console
) -> dict[str, Any]:
    trained = train_cell(cell, profile, data, folder, console)
    everyone = random.Random(cell.seed).sample(list(trained.people), len(trained.people))
    ids = everyone[: profile.records + 1]  # those of a smaller profile come first
    found = {
        "rows": [], "scores": [], "bytes": bytes_of(trained.store), "weights": weights_of(trained)
    }  # fmt: skip
    for sample, other in pairwise(ids):
        of_one = partial(_forgotten, trained, profile, sample, other, console)
        one = kept(folder / f"record-{sample}.json", of_one)
        found["rows"] += one["rows"]
        found["scores"] += one["scores"]
    return found


def _forgotten(
    trained: Trained, profile: Profile, sample: str, other: str, console: Console
) -> dict[str, Any]:
    """The rows of one record; none if there is nothing to forget."""
    cell, run = trained.cell, trained.store.run()
    reference, _ = retrained(
        trained.start, trained.texts, trained.settings, sample, [sample], trained.folder, console
    )
    stay = {i: tokens for i, tokens in trained.people.items() if i != sample}
    judges = Judges(
        reference, load_model(trained.checkpoint), [trained.texts[sample]],
        list(stay.values())[: profile.measured],
        list(trained.held_out.values())[: profile.measured], None,
    )  # fmt: skip
    facts = {"text": cell.name, "seed": cell.seed, "id": sample}
    before, scores = {**facts, **judges.before()}, list[Row]()
    if before["reference"] <= before["before"]:
        console.print(f"{sample} is known no better than without training on it: left out")
        return {"rows": [], "scores": []}
    rows = of_record(trained, run, sample, other, judges, stay, console)
    if cell.tied:
        scores = [facts | row for row in of_scores(trained, run, sample, rows, stay)]
    for row in rows:
        row.pop("rises", None), row.pop("slopes", None)
    return {"rows": [before | row for row in rows], "scores": scores}


def ways_of(cell: Cell, epochs: int, blocks: int) -> list[Way]:
    """Every direction; the paper's, the first epoch's gradient of the embedding, comes first."""
    inner = {f"block {n + 1}": f"transformer.h.{n}.*" for n in range(blocks)}
    inner["last two blocks"] = ",".join(list(inner.values())[-2:])
    places = [*inner.values(), "all"]
    if not cell.tied:
        places += ["head", "embedding,head"]
        plain = [Way("raw", "first"), Way("applied", "all")]
    else:
        single = [*(str(epoch) for epoch in range(2, epochs + 1)), "all"]
        plain = [Way("raw", "first"), Way("applied", "all"), Way("applied", "1")]
        plain += [Way("raw", each) for each in single]
        plain += [Way("applied", each) for each in single[:-1]]
        plain += [Way("raw", "first", side=side) for side in ("input", "output")]
        plain += [Way(kind) for kind in ("newton", "fresh", "random", "other id")]
    firsts = [Way("raw", "first", where) for where in places]
    return plain + firsts + [Way("applied", "all", where) for where in places]


def of_record(
    trained: Trained,
    run: Row,
    sample: str,
    other: str,
    judges: Judges,
    stay: Mapping[str, Tensor],
    console: Console,
) -> list[Row]:
    """A row for each way: at the retrained model's loss, and as long as the paper's is there."""
    store, network = trained.store, load_model(trained.checkpoint)
    [number], [another] = (list(store.resolve([i]).values()) for i in (sample, other))
    measured = len(judges.retained)  # they stand first; what newton spares are others
    held = list(store.resolve(list(stay)[measured:]).values())[: HELD["newton"]]
    blocks, epochs = network.config.n_layer, trained.settings.epochs
    ways, unit, rows = ways_of(trained.cell, epochs, blocks), 0.0, list[Row]()
    losses = sample_losses(network, list(stay.values()))
    with watched(f"forgetting {sample}", console) as progress:
        for done, way in enumerate(ways):
            progress(done, len(ways))
            updates = updates_of(way, trained, run, number, another, network, held)
            row: Row = asdict(way)
            norm = math.hypot(*(float(update.norm()) for update in updates.values()))
            if not norm:  # met at a learning rate of nought only, as the first step of a warm-up is
                continue
            walk = Walk(network, updates, Audience([], {}, []))
            weights = [parameter(network, name).detach() for name in updates]
            size = math.hypot(*(float(weight.norm()) for weight in weights))
            loss_at = partial(_loss_at, walk, network, judges.forgotten)
            aim = mean_loss(judges.reference, judges.forgotten)
            dose = dose_for(loss_at, aim, 1e-4 * size / norm)
            row |= {"dose": dose, "norm": None if dose is None else dose * norm}
            if dose is not None:
                walk.go_to(dose)
                row |= judges.after(network)
                unit = unit or dose * norm
                if trained.cell.tied and way in ways[:2]:  # raw and applied: claims 3 and 4
                    after = sample_losses(network, list(stay.values()))
                    row["rises"] = (after - losses).tolist()
                    row["path"] = [along(walk, network, judges, m, dose) for m in MULTIPLES]
                    walk.go_to(0.0)
                    row["slopes"] = slopes(network, updates["embedding"], stay.values())
            if unit:
                loss_at(unit / norm)
                row["equal R_f"], row["equal loss"] = _state(network, judges)
            if way.kind == "newton" or way == ways[1]:  # made for a dose of their own
                loss_at(1.0)
                row["own R_f"], row["own loss"] = _state(network, judges)
                if way == ways[1]:
                    [start] = sample_losses(judges.original, judges.forgotten).tolist()
                    row["estimate"] = from_undoing([start], [row["own loss"]]).loss
            walk.go_to(0.0)
            rows.append(row)
    return rows


def _loss_at(walk: Walk, network: Any, samples: Sequence[Tensor], dose: float) -> float:
    walk.go_to(dose)
    return mean_loss(network, samples)


def _state(network: Any, judges: Judges) -> tuple[float, float]:
    """R_f and the loss of the forgotten."""
    here = divergence(judges.reference, network, judges.forgotten)
    return here / judges.nothing_done, mean_loss(network, judges.forgotten)


def along(walk: Walk, network: Any, judges: Judges, multiple: float, dose: float) -> list[float]:
    """Multiple of the dose, R_f and loss there."""
    walk.go_to(multiple * dose)
    return [multiple, *_state(network, judges)]


def dose_for(loss_at: Callable[[float], float], target: float, first: float) -> float | None:
    """Where a loss crosses a target, by doubling the dose and halving the bracket; None: nowhere.

    The first crossing that doubling meets: a path need not be monotone.
    """
    low, high = 0.0, first
    for _ in range(DOUBLINGS):
        if loss_at(high) >= target:
            break
        low, high = high, 2 * high
    else:
        return None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if loss_at(middle) >= target else (middle, high)
    return high


def updates_of(
    way: Way, trained: Trained, run: Row, number: int, other: int, network: Any, held: list[int]
) -> Mapping[str, Tensor]:
    """What is added to the weights, by their names."""
    if way.side is not None:
        [record] = records(trained.store, run, [number], "first")
        both = record.gradient(trained.store.model).dense()
        of_input = record.gradient(trained.store.model, sides="input").dense()
        return {"embedding": of_input if way.side == "input" else both - of_input}
    kind, whose = ("raw", other) if way.kind == "other id" else (way.kind, number)
    return find(
        kind, trained.store, run, [whose], network, held=Held(others=held), weights=None,
        seed=trained.cell.seed, layers=way.where.split(","), epochs=way.epochs,
    ).updates  # fmt: skip


def slopes(network: Any, update: Tensor, samples: Any) -> list[float]:
    """How fast each sample's mean loss rises along an update of the embedding, at its start."""
    return [gradient_of(network, tokens).along(update) / (len(tokens) - 1) for tokens in samples]


def of_scores(
    trained: Trained, run: Row, sample: str, rows: Sequence[Row], stay: Mapping[str, Tensor]
) -> list[Row]:
    """How well each score ranks those that stay by what forgetting did to them."""
    store, tokens = trained.store, trained.texts[sample]
    checkpoint = Checkpoint(store, trained.checkpoint)
    query = checkpoint.of_tokens(tokens)
    queries = {
        "gradient · gradient": (query, "dot"),
        "Hessian-vector product": (by_products(store, run, query, checkpoint.network), "hvp"),
        "activation · gradient": (checkpoint.of_activations(tokens), "activation"),
    }
    numbers, found = store.resolve([sample, *stay]), list[Row]()
    noise = random.Random(f"{trained.cell.seed} {sample}")  # drawn anew for each: a control
    scores: dict[str, dict[int, float]] = {
        "random": defaultdict(float, {n: noise.random() for n in numbers.values()})
    }
    for method, (asked, name) in queries.items():
        [answer] = influences(store, [asked], Settings(name))  # type: ignore[arg-type]
        scores[method] = dict(zip(answer.sample_ids, answer.values, strict=True))
    for row in rows:
        if "rises" not in row:
            continue
        rises = torch.tensor(row["rises"]).double().numpy()
        predicted = {m: [of[numbers[i]] for i in stay] for m, of in scores.items()}
        predicted["slope along the update"] = row["slopes"]
        for method, values in predicted.items():
            rho = spearman(torch.tensor(values).double().numpy(), rises)
            own = scores[method][numbers[sample]] if method in scores else None
            about = {"kind": row["kind"], "method": method, "rho": rho, "own": own}
            found.append(about | {"R_f": row["R_f"]})
    return found
