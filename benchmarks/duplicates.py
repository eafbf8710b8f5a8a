"""Removal by fuzzy matching against iterative unlearning, where near-duplicates were planted.

    python benchmarks/duplicates.py           # six people, a few minutes
    python benchmarks/duplicates.py --quick   # one

arXiv 2406.09391 compares two answers to records that the training data holds in several versions:
find them by fuzzy matching and forget all, or unlearn the one in rounds. A small GPT-2 learns the
project's own records of people, some of whom stand in it twice with small changes. Each of these
is then forgotten in every way below; the reference is retrained without either version.

R_f       KL(reference ‖ unlearned) / KL(reference ‖ original) per token of the record itself
versions  the same over all of its versions
loss      of the record, nats per token; the reference's stands in the first line
phone     share of people whose telephone number the model still says, given what stands before it
          in either version
Δ         rise of the mean loss of those that stay

Progress and the table go to stderr, one line of JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from retraining.judges import Judges, mean_loss, spread
from retraining.setting import pretrained, watched
from retraining.tables import WIDE
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from gradstore import Store
from gradstore.demo import CONTEXT, TUNING, records_of, tokens_of
from gradstore.evaluate.extraction import Secret, extracted
from gradstore.training.ingest import CaptureSettings, ingest, train
from gradstore.training.model import load_model
from gradstore.unlearn.forget import ForgetSettings, forget

ROUNDS = 5
WAYS = {
    "raw, once": ForgetSettings(direction="raw"),
    f"raw, {ROUNDS} rounds": ForgetSettings(direction="raw", iterate=ROUNDS),
    f"fresh, {ROUNDS} rounds": ForgetSettings(direction="fresh", iterate=ROUNDS),
    "raw, with duplicates": ForgetSettings(direction="raw", with_duplicates=True),
    "applied": ForgetSettings(direction="applied"),
    "applied, with duplicates": ForgetSettings(direction="applied", with_duplicates=True),
    "newton, with duplicates": ForgetSettings(direction="newton", with_duplicates=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--people", type=int, default=6, help="who are forgotten, of 12")
    parser.add_argument("--others", type=int, default=120, help="records that stay")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console, begun = Console(stderr=True, width=max(WIDE, Console().width)), time.monotonic()
    people, others = (1, 30) if options.quick else (options.people, options.others)
    with tempfile.TemporaryDirectory(prefix="duplicates-") as folder:
        rows = measure(people, others, Path(folder), console)
    summary = summary_of(rows)
    console.print(table_of(summary))
    seconds = time.monotonic() - begun
    line = {"benchmark": "duplicates", "summary": summary, "requests": rows, "seconds": seconds}
    print(json.dumps(line))


def measure(
    people: int,
    others: int,
    folder: Path,
    console: Console,
    *,
    seed: int = 0,
    matched: bool = False,
) -> list[dict[str, Any]]:
    """A row for each person and way; ``seed`` is the training's, and says who is forgotten.

    ``matched``: every way goes to the retrained model's loss, whatever it does to the others.
    """
    everyone, training = records_of("train.jsonl"), replace(TUNING, seed=seed)
    copies = {r["duplicate_of"]: r["id"] for r in everyone if "duplicate_of" in r}
    twice = dict(list(copies.items())[seed * people % len(copies) :][:people])
    known = {*twice, *twice.values()}
    once = [r for r in everyone if r["id"] not in {*copies, *copies.values()}][:others]
    learned = [r for r in everyone if r["id"] in known] + once
    tokenizer = pretrained(folder, console)
    held_out = tokens_of(records_of("holdout.jsonl")[:50], tokenizer)
    texts, base = tokens_of(learned, tokenizer), load_model(folder / "base")
    store, trained = Store.create(folder / "store"), folder / "trained"
    with watched("training, with capture", console) as progress:
        ingest(
            store, base, tokenizer, texts, trained, training, CaptureSettings("all"),
            holdout=held_out, progress=progress,
        )  # fmt: skip
    original, rows = load_model(trained), []
    secrets = {r["id"]: Secret(r["prompt"], " " + r["secret"]) for r in learned}
    for number, (person, copy) in enumerate(twice.items()):
        reference = load_model(folder / "base")
        with watched(f"retraining without {person} and {copy}", console) as progress:
            train(
                reference, texts, folder / "aside", training, without=[person, copy],
                progress=progress,
            )  # fmt: skip
        stay = [tokens for sample, tokens in texts.items() if sample not in (person, copy)]
        judges, both = (
            Judges(
                reference, original, [texts[i] for i in of], spread(stay),
                spread(list(held_out.values())), None,
            )
            for of in ([person], [person, copy])
        )  # fmt: skip
        asked = [secrets[person], secrets[copy]]
        for name, model in (("as trained", original), ("retrained", reference)):
            rows.append(
                {"person": person, "way": name, "verdict": "", **judges.after(model)}
                | {"versions": both.after(model)["R_f"]}
                | {"phone": fmean(extracted(model, tokenizer, asked))}
            )
        for name, settings in WAYS.items():
            console.print(f"{person}: {name}")
            out = folder / f"{number}-{name.replace(' ', '-')}"
            if matched:
                of = both.forgotten if settings.with_duplicates else judges.forgotten
                dose = f"target:{mean_loss(reference, of)}"
                settings = replace(settings, dose=dose, max_holdout_increase=None)
            outcome = forget(store, [person], trained, out, settings)
            model = load_model(outcome.out or trained)
            rows.append(
                {"person": person, "way": name, "verdict": outcome.verdict, **judges.after(model)}
                | {"versions": both.after(model)["R_f"]}
                | {"phone": fmean(extracted(model, tokenizer, asked))}
            )
        console.print(f"loss of {person}, retrained: {mean_loss(reference, [texts[person]]):.3f}")
    return rows


def summary_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over people, shares for the verdict and the phone."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["way"]].append(row)
    return [
        {
            "way": way,
            "people": len(of),
            "forgotten": sum(row["verdict"] == "forgotten" for row in of),
            "loss": median(row["after"] for row in of),
            "R_f": median(row["R_f"] for row in of),
            "versions": median(row["versions"] for row in of),
            "phone": fmean(row["phone"] for row in of),
            "Δ": median(row["Δ"] for row in of),
            "KL_h": median(row["KL_h"] for row in of),
        }
        for way, of in groups.items()
    ]


def table_of(summary: list[dict[str, Any]]) -> Table:
    table = Table(*summary[0], title=f"medians over people; {CONTEXT} tokens at most")
    for row in summary:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()))
    return table


if __name__ == "__main__":
    main()
