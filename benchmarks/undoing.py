"""What undoing a record's steps leaves on the table: each part of it left out, changed or added.

    python benchmarks/undoing.py --data ../shared/data           # LUME, some ten minutes
    python benchmarks/undoing.py --data ../shared/data --quick   # too little training to forget of

``applied`` undoes Σ w · η · s · g / √v̂ over all exposures, at the embedding: learning rate η, the
share s that the record's summed loss had in its step (batch mean and clipping), Adam's second
moment v̂ at the end of the run, and w what later training left of it. Here each of these is taken
otherwise, one at a time, and what comes out is held against a model retrained without the records.

R_f as in forgetting.py, at dose 1; best: the least of it along the direction, and the dose where it
lies; Δ: the rise of the loss of 60 records that stay (nats per token).
Progress and the table go to stderr, one line of JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from retraining.judges import Judges, along, spread
from retraining.setting import TRAINING, Plan, retrained, setting_of, watched, workplace
from retraining.tables import WIDE, table_of_summary
from rich.console import Console
from torch import Tensor, nn
from transformers.utils import logging

from gradstore import Store
from gradstore.capture.layers import parameter
from gradstore.factored import FactoredGradient
from gradstore.training.ingest import CaptureSettings, ingest
from gradstore.training.model import load_model
from gradstore.unlearn.applied import HALF, PULL, applied
from gradstore.unlearn.exposures import records
from gradstore.unlearn.unused import as_if_unused, tokens_of

MOMENTUM = 0.9  # Adam's β₁


@dataclass(frozen=True)
class Undoing:
    """How a step is undone; the defaults are what ``applied`` does."""

    divided: bool = True  # by √v̂
    nearest: bool = False  # v̂ of whichever snapshot is nearer: the first epoch's, or the end's
    floored: bool = True  # v̂ no less than the exposure's own gradient put there
    washed: bool = True  # else nothing is, and half of it all is undone
    clipping: bool = True
    share: bool = True  # else the run's mean share
    momentum: bool = False  # the step's part in those that follow
    places: bool = False  # the position embedding too
    sides: tuple[str, ...] = ("input", "output")
    own_rows: bool = False  # of tokens in the record


WAYS = {
    "applied": Undoing(),
    "not divided by √v̂": Undoing(divided=False, floored=False, washed=False),
    "v̂ of the nearest snapshot": Undoing(nearest=True),
    "v̂ not floored by the own gradient": Undoing(floored=False),
    "nothing washed out, half": Undoing(washed=False),
    "clipping not reckoned": Undoing(clipping=False),
    "batch share not reckoned": Undoing(share=False),
    "momentum reckoned": Undoing(momentum=True),
    "positions too": Undoing(places=True),
    "input side alone": Undoing(sides=("input",)),
    "output side alone": Undoing(sides=("output",)),
    "rows of its own tokens alone": Undoing(own_rows=True),
}
TREATED = "applied, unused rows apart"  # what `gradstore forget` does


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    data = os.environ.get("GRADSTORE_REAL_DATA")
    parser.add_argument("--data", type=Path, default=data, required=not data)
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--alone", type=int, default=6, help="records forgotten one at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--keep", type=Path, help="folder of trainings that are not done again")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console, rows = Console(stderr=True, width=max(WIDE, Console().width)), []
    for seed in options.seeds:
        plan = Plan(
            "lume", "tiny", replace(TRAINING["lume"], seed=seed), people=options.people,
            held_out=options.people, alone=options.alone, sets=(10,),
        )  # fmt: skip
        if options.quick:
            training = replace(plan.training, epochs=4)
            plan = replace(plan, training=training, people=40, held_out=40, alone=1)
        with workplace(plan, options.keep) as work:
            rows += list(measure(plan, options.data, work, console))
    summary = summary_of(rows)
    console.print(table_of_summary(summary))
    print(json.dumps({"benchmark": "undoing", "ways": summary, "requests": rows}))


def measure(plan: Plan, data: Path, folder: Path, console: Console) -> Iterator[dict[str, Any]]:
    """One row for each request and way."""
    setting = setting_of(plan, data, folder, console)
    texts, trained = setting.people | setting.passages, folder / "trained"
    if (folder / "ingested").exists():
        store = Store.open(folder / "store")
    else:
        store = Store.create(folder / "store")
        with watched("training, with capture", console) as progress:
            ingest(
                store, setting.start(), setting.tokenizer, texts, trained, plan.training,
                CaptureSettings(epochs_captured="all"), progress=progress,
            )  # fmt: skip
        (folder / "ingested").touch()
    run, original = store.run(), load_model(trained)
    for name, ids in setting.requests.items():
        reference, _ = retrained(setting.start, texts, plan.training, name, ids, folder, console)
        stay = spread([tokens for one, tokens in setting.people.items() if one not in ids])
        judges = Judges(
            reference, original, [texts[one] for one in ids], stay,
            spread(list(setting.held_out.values())), None,
        )  # fmt: skip
        numbers = list(store.resolve(ids).values())
        console.print(f"{name}: {len(WAYS) + 1} ways")
        found = {way: undone(store, run, numbers, how) for way, how in WAYS.items()}
        known = applied(store, run, numbers)  # this script's loop is the tool's direction
        torch.testing.assert_close(found["applied"]["embedding"], known.update)
        own = tokens_of(store, run, numbers)
        found[TREATED] = as_if_unused(store, run, original, known.updates, own)[0]
        for way, updates in found.items():
            dose = 1.0 if way == TREATED or WAYS[way].washed else HALF
            model = moved(original, updates, dose)
            row = {"request": name, "records": len(ids), "way": way, **judges.after(model)}
            yield row | along(model, dose, judges)


def undone(
    store: Store, run: Mapping[str, Any], numbers: Sequence[int], how: Undoing
) -> dict[str, Tensor]:
    """The sum over all stored exposures, dense and one at a time."""
    steps = store.rows(
        "SELECT step, learning_rate FROM steps WHERE run_id = ? ORDER BY step", [run["run_id"]]
    )
    rates = {step: float(rate) for step, rate in steps}
    updates: dict[str, Tensor] = {}
    met = records(store, dict(run), numbers)
    usual = mean(record.exposure.batch_share for record in met)
    for record in met:
        exposure = record.exposure
        share = exposure.batch_share if how.share else usual
        share *= exposure.grad_scale if how.clipping else 1.0
        rate = rates[exposure.step]
        if how.momentum:
            rate = sum(
                later * (1 - MOMENTUM) * MOMENTUM ** (step - exposure.step) / (1 - MOMENTUM**step)
                for step, later in rates.items()
                if step >= exposure.step
            )
        after = sum(later for step, later in rates.items() if step > exposure.step)
        gradients = {"embedding": record.gradient(store.model)}
        if how.places:
            gradients["position"] = record.gradient(store.model, "position")
        for name, gradient in gradients.items():
            if name == "embedding" and how.sides != ("input", "output"):
                input_side, *output_side = gradient.terms
                terms = [input_side] if how.sides == ("input",) else output_side
                gradient = FactoredGradient(terms, gradient.shape)
            g = gradient.dense()
            if name == "embedding" and how.own_rows:
                own = torch.zeros(len(g), 1)
                own[record.tokens.long()] = 1
                g *= own
            root, epsilon = second_moment(store, run, name, exposure.step if how.nearest else None)
            if how.floored:
                root = root.maximum((share * g).abs() * (1 - run["beta2"]) ** 0.5)
            left = 1 / (1 + PULL * after * root / share) if how.washed else 1.0
            divisor = root + epsilon if how.divided else root.mean()
            step = left * rate * share * g / divisor
            updates[name] = updates.get(name, torch.zeros_like(g)) + step
    return updates


def second_moment(
    store: Store, run: Mapping[str, Any], name: str, near: int | None
) -> tuple[Tensor, float]:
    """√v̂ at the end, or at whichever snapshot is nearer to the step ``near``, and ε."""
    kept = [store.moments(run["run_id"], name, "end")]
    if near is not None:
        kept.append(store.moments(run["run_id"], name, "first-epoch"))
    v, step = min(filter(None, kept), key=lambda of: 0 if near is None else abs(of[1] - near))
    return (v / (1 - run["beta2"] ** step)).sqrt(), run["epsilon"]


@torch.no_grad()
def moved(original: nn.Module, updates: Mapping[str, Tensor], dose: float) -> nn.Module:
    """A copy of the model with the updates added ``dose`` times."""
    model = deepcopy(original)
    for name, update in updates.items():
        parameter(model, name).add_(update, alpha=dose)
    return model


def summary_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Medians over requests of one size."""
    return [
        {
            "records": size,
            "way": way,
            "requests": len(of),
            **{key: median(row[key] for row in of) for key in ("R_f", "best_R_f", "best_dose")},
            "Δ": median(row["Δ"] for row in of),
        }
        for size in sorted({row["records"] for row in rows})
        for way in (*WAYS, TREATED)
        for of in [[row for row in rows if (row["records"], row["way"]) == (size, way)]]
    ]


if __name__ == "__main__":
    main()
