"""Real records: train with capture, forget by id, ask in SQL, and compare with retraining.

    python benchmarks/lume.py --data ../shared/data               # a fresh GPT-2, V=50,257
    python benchmarks/lume.py --data ../shared/data --start tiny  # a pretrained one, V=4,096
    python benchmarks/lume.py --data ../shared/data --quick       # does it run? two minutes

Three LUME biographies (with --quick one) are forgotten one at a time and ten at once, each in
every direction of ``gradstore forget`` at its default dose. The reference of a request is retrained
from the same start with the same seed, order and batches, the forgotten's contribution left out.

KL_f    KL(reference ‖ original) per token of the forgotten records: what there is to forget
R_f     KL(reference ‖ unlearned) / KL_f: 0 = retrained, 1 = as far from it as doing nothing
best    the least R_f along the same direction, and the dose where it lies
Δ       rise of the mean loss of 60 retained biographies, nats per token
KL_h    KL(reference ‖ unlearned) per token of 60 held-out biographies; floor: the original's

Progress and tables go to stderr, one line of JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers.utils import logging

from gradstore import Store
from gradstore.capture.taps import embedding_of
from gradstore.evaluate.loss import sample_losses
from gradstore.training.corpus import read_corpus, tokenize
from gradstore.training.ingest import CaptureSettings, TrainingSettings, ingest, train
from gradstore.training.model import load_model, load_tokenizer, new_model
from gradstore.unlearn.direction import DIRECTIONS
from gradstore.unlearn.forget import ForgetSettings, Outcome, forget

LENGTH = 128  # tokens; longer texts are cut
MEASURED = 60  # retained, and held-out, biographies
MULTIPLES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.6, 2.0, 3.0)  # of the dose given
SQL = {
    "what was asked, and what it did to those that stay": """
        SELECT f.request_id AS request, f.direction, f.verdict, count(*) AS records,
               avg(f.loss_before) AS loss_before, avg(f.loss_after) AS loss_after,
               any_value(c.change) AS retained_change, any_value(c.worst_change) AS worst_change
        FROM forgotten f JOIN collateral c ON c.request_id = f.request_id AND c.role = 'retained'
        GROUP BY ALL ORDER BY request""",
    "how the forgotten were learned": """
        SELECT epoch, count(*) AS gradients, avg(loss) AS loss, avg(d_norm) AS d_norm
        FROM gradients WHERE id IN (SELECT id FROM forgotten) GROUP BY epoch ORDER BY epoch""",
    "relative error of what was stored, where it was measured": """
        SELECT epoch, count(*) AS measured, max(relative_error) AS largest
        FROM gradients WHERE relative_error IS NOT NULL GROUP BY epoch ORDER BY epoch""",
}


@dataclass(frozen=True)
class Plan:
    """What is trained, and on how much."""

    start: str
    training: TrainingSettings
    people: int = 300
    held_out: int = 200
    layers: int = 4  # of a model made from scratch
    width: int = 128
    alone: int = 3  # records forgotten one at a time


@dataclass(frozen=True)
class Setting:
    """A plan with its data at hand; ``start`` makes the untrained model, the same each time."""

    start: Callable[[], Any]
    tokenizer: Any
    people: dict[str, Tensor]
    passages: dict[str, Tensor]
    held_out: dict[str, Tensor]
    requests: dict[str, list[str]]


@dataclass(frozen=True)
class Judges:
    """What the result of a request is held against."""

    reference: nn.Module
    original: nn.Module
    forgotten: list[Tensor]
    retained: list[Tensor]
    held_out: list[Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    data = os.environ.get("GRADSTORE_REAL_DATA")
    parser.add_argument("--data", type=Path, default=data, required=not data)
    parser.add_argument("--start", choices=("scratch", "tiny"), default="scratch")
    parser.add_argument("--epochs", type=int, help="default: 12, with --quick 4")
    parser.add_argument("--quick", action="store_true", help="too little training to forget of")
    options = parser.parse_args()
    epochs = options.epochs or (4 if options.quick else 12)
    training = TrainingSettings(epochs=epochs, batch_size=16, learning_rate=1.5e-3)
    small = {"people": 30, "held_out": 10, "layers": 2, "width": 64, "alone": 1}
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="lume-") as folder:
        plan = Plan(options.start, training, **(small if options.quick else {}))
        print(json.dumps(measure(plan, options.data, Path(folder), Console(stderr=True))))


def setting_of(plan: Plan, data: Path, folder: Path) -> Setting:
    everyone = read_corpus(data / "lume" / "people.jsonl")[: plan.people + plan.held_out]
    people, held_out = everyone[: plan.people], everyone[plan.people :]
    if plan.start == "tiny":  # fine-tuned on as many passages of what it was pretrained on
        library = read_corpus(data / "corpora" / "public_domain_docs.jsonl")
        passages = random.Random(0).sample(library, len(people))
        tokenizer = load_tokenizer(data / "tiny_gpt2")
        start: Callable[[], Any] = partial(load_model, data / "tiny_gpt2")
    else:
        passages, tokenizer = [], load_tokenizer(data / "tokenizer_gpt2")
        shape = {"n_layer": plan.layers, "n_head": 4, "n_embd": plan.width, "n_positions": LENGTH}
        dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        config = folder / "config.json"
        config.write_text(json.dumps({"model_type": "gpt2", **shape, **dropout}))
        start = partial(new_model, config, tokenizer, plan.training.seed)
    members, further, strangers = (
        tokenize(texts, tokenizer, LENGTH, truncate=True) for texts in (people, passages, held_out)
    )
    ten = [person.id for person in people[:: len(people) // 10]][:10]
    requests = {ten[at][:8]: [ten[at]] for at in (0, 2, 3)[: plan.alone]} | {"ten together": ten}
    return Setting(start, tokenizer, members, further, strangers, requests)


def measure(plan: Plan, data: Path, folder: Path, console: Console) -> dict[str, Any]:
    """Carry the plan out below ``folder``; returns all that was measured."""
    setting = setting_of(plan, data, folder)
    texts, everyone = setting.people | setting.passages, list(setting.held_out.values())
    store, trained, begun = Store.create(folder / "store"), folder / "trained", time.monotonic()
    with watched("training, with capture", console) as progress:
        ingest(
            store, setting.start(), setting.tokenizer, texts, trained, plan.training,
            CaptureSettings(epochs_captured="all"), holdout=setting.held_out, progress=progress,
        )  # fmt: skip
    ingest_seconds, original = time.monotonic() - begun, load_model(trained)
    rows: list[dict[str, Any]] = []
    losses = {
        "trained": mean_loss(original, list(setting.people.values())),
        "held out": mean_loss(original, everyone),
    }
    for name, ids in setting.requests.items():
        reference, begun = setting.start(), time.monotonic()
        with watched(f"retraining without {name}", console) as progress:
            where = folder / "reference"
            train(reference, texts, where, plan.training, without=ids, progress=progress)
        seconds = time.monotonic() - begun
        stay = [tokens for sample, tokens in setting.people.items() if sample not in ids]
        forgotten = [texts[sample] for sample in ids]
        judges = Judges(reference, original, forgotten, spread(stay), spread(everyone))
        for kind in DIRECTIONS:
            begun, out = time.monotonic(), folder / f"unlearned-{len(rows)}"
            outcome = forget(store, ids, trained, out, ForgetSettings(direction=kind))
            row = {"request": name, "direction": kind, "seconds": time.monotonic() - begun}
            rows.append(row | {"retraining": seconds} | judge(outcome, judges))
    console.print(table_of(rows))
    answers = {title: ask(store, title, console) for title in SQL}
    stats = store.stats()
    console.print(f"Mean loss of biographies: {losses}; trained in {ingest_seconds:.0f} s", stats)
    return {
        "benchmark": "lume", "plan": asdict(plan), "threads": torch.get_num_threads(),
        "ingest_seconds": ingest_seconds, "losses": losses, "requests": rows, "sql": answers,
        "store": stats,
    }  # fmt: skip


def judge(outcome: Outcome, judges: Judges) -> dict[str, Any]:
    """Hold what a request wrote against the reference, at its dose and along its direction."""
    reference, original, forgotten = judges.reference, judges.original, judges.forgotten
    nothing_done = divergence(reference, original, forgotten)
    facts = {
        "verdict": outcome.verdict,
        "before": mean_loss(original, forgotten),
        "reference": mean_loss(reference, forgotten),
        "KL_f": nothing_done,
        "KL_h_floor": divergence(reference, original, judges.held_out),
    }
    if outcome.out is None or outcome.dose is None:
        return facts
    unlearned = load_model(outcome.out)
    rise = mean_loss(unlearned, judges.retained) - mean_loss(original, judges.retained)
    facts |= {
        "after": mean_loss(unlearned, forgotten),
        "Δ": rise,
        "KL_h": divergence(reference, unlearned, judges.held_out),
    }
    here, start = embedding_of(unlearned).weight, embedding_of(original).weight
    update, path = (here - start).detach(), {}
    for multiple in MULTIPLES:
        with torch.no_grad():
            here.copy_(start).add_(update, alpha=multiple)
        distance = divergence(reference, unlearned, forgotten)
        path[multiple * outcome.dose] = distance / nothing_done
    best = min(path, key=path.__getitem__)
    facts |= {"dose": outcome.dose, "R_f": path[outcome.dose]}
    return facts | {"best_dose": best, "best_R_f": path[best], "path": list(path.items())}


@torch.no_grad()
def divergence(reference: nn.Module, model: nn.Module, samples: Iterable[Tensor]) -> float:
    """KL(reference ‖ model) in nats per predicted token."""
    total, count = 0.0, 0
    for tokens in samples:
        p, q = (
            log_softmax(m(input_ids=tokens[None]).logits[0, :-1], dim=-1)
            for m in (reference.eval(), model.eval())
        )
        total += float(kl_div(q, p, log_target=True, reduction="sum"))
        count += len(p)
    return total / count


def mean_loss(model: nn.Module, samples: Sequence[Tensor]) -> float:
    return float(sample_losses(model, samples).mean())


def spread(samples: list[Tensor]) -> list[Tensor]:
    """At most ``MEASURED`` of the samples, evenly spaced."""
    return samples[:: max(1, len(samples) // MEASURED)][:MEASURED]


@contextmanager
def watched(what: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; training reports its steps to what it yields."""
    with Progress(console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda step, steps: bar.update(task, completed=step, total=steps)


def ask(store: Store, title: str, console: Console) -> list[dict[str, Any]]:
    columns, answer = store.query(SQL[title])
    table = Table(*columns, title=title)
    for row in answer:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print(table)
    return [dict(zip(columns, row, strict=True)) for row in answer]


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = {
        "request": "{request}", "direction": "{direction}", "verdict": "{verdict}",
        "loss": "{before:.3f}", "after": "{after:.3f}", "reference": "{reference:.3f}",
        "KL_f": "{KL_f:.4f}", "R_f": "{R_f:.2f}", "best @ dose": "{best_R_f:.2f} @ {best_dose:.3g}",
        "Δ": "{Δ:+.4f}", "KL_h (floor)": "{KL_h:.4f} ({KL_h_floor:.4f})", "dose": "{dose:.3g}",
        "forget s": "{seconds:.1f}", "retrain s": "{retraining:.0f}",
    }  # fmt: skip
    table = Table(*columns, title="against retraining without the forgotten records")
    for row in rows:
        table.add_row(*(_filled(cell, row) for cell in columns.values()))
    return table


def _filled(cell: str, row: Mapping[str, Any]) -> str:
    try:
        return cell.format_map(row)
    except KeyError:  # refused: nothing was written, so there is no after
        return "–"


if __name__ == "__main__":
    main()
