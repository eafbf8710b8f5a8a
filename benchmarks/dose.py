"""Is the default dose right for every training? The best dose of runs that differ in one setting.

    python benchmarks/dose.py --data ../shared/data           # eight trainings, half an hour
    python benchmarks/dose.py --data ../shared/data --quick   # two short ones
    python benchmarks/dose.py --text people --layers          # the whole model, over an hour

The step of an exposure is undone as far as later training has not washed it out already; how far
that is depends on what came after, not on a constant. Here LUME biographies, or the project's own
people, are learned in runs of different length, schedule, warm-up and Adam's β₂; single records and
ten at once are forgotten at the default dose 1 and along the same direction at others, against
models retrained without them. With --layers, newton moves the whole model, and the embedding alone
in rows of its own.

R_f as in forgetting.py; best: the least of it along the direction, and the dose where it lies.
Progress and the table go to stderr, one line of JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from forgetting import measure
from retraining.setting import Plan, workplace
from retraining.tables import WIDE
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from gradstore.training.ingest import TrainingSettings

USUAL = TrainingSettings(epochs=12, batch_size=16, learning_rate=1.5e-3)
RUNS = {
    "as usual": USUAL,
    "6 epochs": replace(USUAL, epochs=6),
    "24 epochs": replace(USUAL, epochs=24),
    "constant": replace(USUAL, schedule="constant"),
    "cosine": replace(USUAL, schedule="cosine"),
    "30 warm-up steps": replace(USUAL, schedule="linear", warmup_steps=30),
    "β₂ = .99": replace(USUAL, beta2=0.99),
    "batches of 32, no clipping": replace(USUAL, batch_size=32, max_grad_norm=1e9),
}
SHORT = ("6 epochs", "β₂ = .99")  # with --quick


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    data = os.environ.get("GRADSTORE_REAL_DATA")
    parser.add_argument("--data", type=Path, default=data, help="of LUME")
    parser.add_argument("--text", choices=("lume", "people"), default="lume")
    parser.add_argument("--layers", action="store_true", help="newton moves the whole model, too")
    parser.add_argument("--people", type=int, help="default: 100 biographies, 300 people")
    parser.add_argument("--alone", type=int, default=3, help="records forgotten one at a time")
    parser.add_argument("--keep", type=Path, help="folder of trainings that are not done again")
    parser.add_argument("--runs", nargs="+", choices=RUNS, help="some of the trainings")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if not options.data and options.text != "people":
        parser.error("--data DIR, with lume/ in it, or --text people")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console, rows = Console(stderr=True, width=max(WIDE, Console().width)), []
    people = options.people or (300 if options.text == "people" else 100)
    for name in options.runs or (SHORT if options.quick else RUNS):
        training = RUNS[name]
        plan = Plan(
            options.text, "tiny", training, people=people, held_out=people,
            alone=options.alone, sets=(10,), directions=("applied", "newton"),
            inner=options.layers,
        )  # fmt: skip
        if options.quick:
            short = replace(training, epochs=training.epochs // 2)
            plan = replace(plan, training=short, people=40, held_out=40, alone=1)
        console.rule(name)
        with workplace(plan, options.keep) as work:
            found = measure(plan, options.data, work, console, without_baselines=True)
        rows += of_run(name, found["requests"])
    console.print(table_of(rows))
    print(json.dumps({"benchmark": "dose", "runs": rows}))


def of_run(name: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each direction and size: medians over requests."""
    rows = []
    for direction in ("applied", "newton", "newton, embedding"):
        for size in sorted({row["records"] for row in requests}):
            of = [
                row
                for row in requests
                if row["direction"] == direction and row["records"] == size and "R_f" in row
            ]
            if of:
                rows.append(
                    {
                        "run": name, "direction": direction, "records": size, "requests": len(of),
                        "R_f": median(row["R_f"] for row in of),
                        "best R_f": median(row["best_R_f"] for row in of),
                        "best dose": median(row["best_dose"] for row in of),
                        "of the way": median(
                            (row["after"] - row["before"]) / (row["reference"] - row["before"])
                            for row in of
                        ),
                    }
                )  # fmt: skip
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(*rows[0], title="the default dose is 1; medians over requests")
    for row in rows:
        table.add_row(*(f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()))
    return table


if __name__ == "__main__":
    main()
