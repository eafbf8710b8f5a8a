"""The five claims of arXiv 2406.09391, put to the test: one command, its tables, its sentences.

    python benchmarks/paper_claims.py --data ../shared/data --keep folder   # within the hour
    python benchmarks/paper_claims.py --data ../shared/data --quick         # does it run?
    python benchmarks/paper_claims.py --data ../shared/data --long          # more seeds and records
    python benchmarks/paper_claims.py --data ../shared/data --tables docs/paper.md    # that page

Without --data or GRADSTORE_REAL_DATA there is no text but the synthetic, and --tables puts its
results alone in the place of all that the page has.

A small GPT-2, pretrained on public-domain books, is fine-tuned on LUME biographies (with its head
tied to the embedding, and untied), another on the project's own synthetic records, which is all
there is without --data. Every gradient is captured, of every layer at every epoch. Records drawn by
the seed are forgotten one at a time, along every direction; each result is held against a model
trained again from the same start, in the same order and batches, without the record. Nothing is
chosen by these records: there is no setting to tune.

matched     the dose at which the record's loss equals the retrained model's, by bisection
equal norm  the dose at which the update is as long as the first-epoch embedding gradient's, matched
R_f         KL(retrained ‖ unlearned) / KL(retrained ‖ original) per token of the record:
            0 = retrained, 1 = as far from it as doing nothing
Δ           rise of the mean loss of records that stay, nats per token
KL_h        KL(retrained ‖ unlearned) on held-out records, as a multiple of the original's
way         the loss as a share of the way from the original's to the retrained model's

Intervals are 95 %, by bootstrap over (record, seed). Comparisons are of the same records: the
geometric mean of the ratio of R_f, below 1 where the paper's choice is nearer to retraining.
With --keep a run that was killed goes on where it was. Progress and tables go to stderr, one line
of JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import duplicates
import torch
from claims.findings import sentences
from claims.measure import measure
from claims.page import tables, write
from claims.plot import draw
from claims.results import Results
from claims.training import Cell, Profile, kept
from retraining.setting import pretrained
from retraining.tables import WIDE
from rich.console import Console
from transformers.utils import logging

PROFILES = {
    "default": Profile(),
    "quick": Profile(
        people=16,
        held_out=8,
        epochs=3,
        records=1,
        seeds=1,
        measured=4,
        twice=1,
        others=16,
        both=False,
    ),
    "long": Profile(people=100, records=12, seeds=5, measured=48, twice=4, others=120),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    data = os.environ.get("GRADSTORE_REAL_DATA")
    parser.add_argument("--data", type=Path, default=data, help="without it: synthetic records")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="profile", action="store_const", const="quick")
    size.add_argument("--long", dest="profile", action="store_const", const="long")
    parser.add_argument("--keep", type=Path, help="folder of what is not done again")
    parser.add_argument("--tables", type=Path, help="page to write tables and sentences into")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = options.profile or "default"
    console = Console(stderr=True, width=max(WIDE, Console().width))
    place = nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory("-claims")
    done = sha256(repr(PROFILES[name]).encode()).hexdigest()[:8]  # by another profile is of no use
    with place as folder:
        keep = Path(folder) / f"{name}-{done}"
        found = run(PROFILES[name], options.data, keep, console)
        took = json.loads((keep / "took.json").read_text())
    if not found["rows"]:
        sys.exit("no record was known better than without training on it: nothing to forget")
    results = Results(**found)
    for table in tables(results):
        console.print(table.rich())
    for sentence in sentences(results):
        console.print(f"[bold]{sentence}[/bold]")
    if options.tables:
        write(
            results,
            options.tables,
            f"Measured with torch {took['torch']} and {took['threads']} of its threads in "
            f"{took['processor'] / 60:.0f} minutes of a processor; {took['wall'] / 60:.0f} passed.",
        )
        draw(results, options.tables.with_suffix(".svg"))
    line = {"benchmark": "paper_claims", "profile": name, **asdict(PROFILES[name])}
    line |= {"took": took, "sentences": sentences(results), **found}
    print(json.dumps(line))


@contextmanager
def timed(file: Path) -> Iterator[None]:
    """Add the seconds that the body takes to those of the bodies, and runs, before it."""
    wall, processor = time.monotonic(), time.process_time()
    yield
    took = json.loads(file.read_text()) if file.exists() else {"wall": 0.0, "processor": 0.0}
    took["wall"] += time.monotonic() - wall
    took["processor"] += time.process_time() - processor
    about = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    file.write_text(json.dumps(about | took))


def run(profile: Profile, data: Path | None, keep: Path, console: Console) -> dict[str, Any]:
    """Measure every training, and the duplicates."""
    keep.mkdir(parents=True, exist_ok=True)
    rows, scores, copies, sizes = [], [], [], dict[str, Any]()
    for seed in range(profile.seeds):
        tried = [Cell("synthetic", True, seed), Cell("synthetic", False, seed)]
        if data is not None:
            tried = [Cell("lume", True, seed), Cell("lume", False, seed), *tried[: profile.both]]
        for cell in tried:
            with timed(keep / "took.json"):
                found = measure(cell, profile, data, keep, console)
            rows += found["rows"]
            scores += found["scores"]
            sizes[cell.name] = {"bytes": found["bytes"], "weights": found["weights"]}
        with timed(keep / "took.json"):
            copies += of_duplicates(profile, seed, keep, console)
    return {"rows": rows, "scores": scores, "copies": copies, "sizes": sizes}


def of_duplicates(
    profile: Profile, seed: int, keep: Path, console: Console
) -> list[dict[str, Any]]:
    """The rows of duplicates.py at the retrained model's loss, with one seed."""

    def make() -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory(dir=keep, prefix="duplicates-") as folder:
            pretrained(keep, console)
            (Path(folder) / "base").symlink_to((keep / "base").resolve())
            return duplicates.measure(
                profile.twice, profile.others, Path(folder), console, seed=seed, matched=True
            )

    rows = kept(keep / f"duplicates-{seed}.json", make)
    return [row | {"seed": seed} for row in rows]


if __name__ == "__main__":
    main()
