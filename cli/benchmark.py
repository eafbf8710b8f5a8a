"""``gradstore eval --benchmark``: public benchmarks' tables for checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .output import emit, hush, say


def show_benchmark(
    name: str,
    folder: Path,
    checkpoints: Mapping[str, Path],
    records: int | None,
    split: str | None,
    template: str | None,
    output: str,
) -> None:
    """Print a benchmark's table with a column for each checkpoint, measured one after the other."""
    hush()

    from gradstore.evaluate import lume, tofu
    from gradstore.training.model import load_model, load_tokenizer

    def loaded() -> Iterator[tuple[str, Any, Any]]:
        for column, path in checkpoints.items():
            say(f"measuring {path}")
            yield column, load_model(path), load_tokenizer(path)

    if name == "tofu":
        sets = tofu.read(folder, split or tofu.SPLIT, records)
        notes = tofu.missing(sets)
        answers = {
            column: tofu.measure(model, tokenizer, sets, template or tofu.TEMPLATE)
            for column, model, tokenizer in loaded()
        }
        reference = "reference" if "reference" in answers else None
        emit(rows := tofu.table(answers, reference), output)
        skipped = {r["set"]: r for r in rows if r["metric"] == "probability"}
        if reference is None:
            notes.append("Forget quality compares with a retain model: give it with --reference.")
    else:
        benchmark = lume.read(folder, records)
        notes = lume.missing(benchmark)
        results = {
            column: lume.measure(model, tokenizer, benchmark)
            for column, model, tokenizer in loaded()
        }
        emit(rows := lume.table(benchmark, results), output)
        skipped = {f"{r['set']}, {r['metric']}": r for r in rows if r["set"] and r["task"] is None}
    notes += [
        f"{row['skipped']} of {row['records'] + row['skipped']} records are left out ({name}): "
        "with their answers they are longer than what a model reads."
        for name, row in skipped.items()
        if row["skipped"]
    ]
    for note in notes:
        say(note)
