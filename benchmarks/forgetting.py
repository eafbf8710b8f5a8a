"""Which way of forgetting ends nearest to retraining? On real records, against references.

    python benchmarks/forgetting.py --data ../shared/data                  # LUME, pretrained start
    python benchmarks/forgetting.py --data ../shared/data --text tofu      # TOFU, whole authors
    python benchmarks/forgetting.py --data ../shared/data --start scratch  # LUME, V = 50,257
    python benchmarks/forgetting.py --data ../shared/data --keep folder    # trainings kept
    python benchmarks/forgetting.py --text people                          # people of its own
    python benchmarks/forgetting.py --text people --full                   # three seeds, 20 alone
    python benchmarks/forgetting.py --text people --quick                  # does it run?

A small GPT-2 is trained on records with capture. Some are forgotten one at a time, others in sets
(ten and thirty LUME biographies, or people of the project's own, which look alike; the twenty
answers of a TOFU author), by each stored direction at its own default dose, by controls, and by
GradDiff and NPO on the whole model, which go to the target that the tool estimates at whichever of
three learning rates ends nearest to retraining. The reference of a request is retrained from the
same start with the same seed, order and batches, the forgotten's contribution left out.

KL_f    KL(reference ‖ original) per token of the forgotten records: what there is to forget
R_f     KL(reference ‖ unlearned) / KL_f: 0 = retrained, 1 = as far from it as doing nothing
best    the least R_f along the same direction, and the dose where it lies
Δ       rise of the mean loss of 60 retained records, nats per token
KL_h    KL(reference ‖ unlearned) per token of 60 held-out records; floor: the original's
way     how far the loss went towards the reference's; target_rms: error of the loss that the tool
        estimates for a record never trained on, in_range: how often the reference's lies in its
        range, held_out_rms: error of carrying the members' losses onto the held-out ones

With --layers the store keeps the blocks' gradients too, and newton and fresh move the whole model.
With --checkpoints N ... it keeps the first epoch only, and directions that undo steps are made once
for each N, the other epochs recomputed at so many checkpoints.

With --attacks also which requests pass for retrained: membership (AUC of the forgotten against the
held-out within the reference's interval), relearning (no faster than the reference), rounding (to
bfloat16 and int8 changes no verdict).

Progress and tables go to stderr, one line of JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import plotext
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from transformers.utils import logging

from gradstore import Store
from gradstore.capture.taps import embedding_of
from gradstore.data.people import base_records, holdout_records, train_records
from gradstore.demo import BASE, MODEL, TUNING, VOCABULARY, tokens_of
from gradstore.evaluate.attacks import RelearnSettings
from gradstore.evaluate.check import third_bar
from gradstore.evaluate.divergence import divergences, per_token
from gradstore.evaluate.loss import sample_losses
from gradstore.training.corpus import Document, read_corpus, tokenize
from gradstore.training.ingest import (
    CaptureSettings,
    TrainingSettings,
    ingest,
    save_checkpoint,
    train,
)
from gradstore.training.model import load_model, load_tokenizer, new_model, train_tokenizer
from gradstore.unlearn.baselines import BaselineSettings, retained_from, unlearn_by_steps
from gradstore.unlearn.direction import DIRECTIONS
from gradstore.unlearn.forget import ForgetSettings, forget
from gradstore.unlearn.request import Outcome
from gradstore.unlearn.target import from_held_out

LENGTH = 128  # tokens; longer texts are cut
MEASURED = 60  # retained, and held-out, biographies
MULTIPLES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.6, 2.0, 3.0)  # of the dose given
BASELINES, RATES, STEPS = ("graddiff", "npo"), (3e-5, 1e-4, 3e-4), 60
AUTHOR = 20  # answers
COMPLETED = ("applied", "newton", "orthogonal")  # by checkpoints, where epochs were not captured
TRAINING = {
    "lume": TrainingSettings(epochs=12, batch_size=16, learning_rate=1.5e-3),
    "tofu": TrainingSettings(epochs=10, batch_size=12, learning_rate=1e-3),
    "people": TUNING,
}
WIDE = 150  # columns, for tables that are not cut
CHECKS = ("membership", "relearning", "rounding")  # shares of requests that pass, with --attacks
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

    text: str
    start: str
    training: TrainingSettings
    people: int = 300
    held_out: int = 200
    layers: int = 4  # of a model made from scratch
    width: int = 128
    alone: int = 4  # records forgotten one at a time
    sets: tuple[int, ...] = (10, 30)
    directions: tuple[str, ...] = DIRECTIONS
    attacks: bool = False
    checkpoints: tuple[int, ...] | None = None  # store one epoch, recompute the rest at so many
    inner: bool = False  # capture the layers of the blocks too


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
    attack: RelearnSettings | None

    def before(self) -> dict[str, Any]:
        """What there is to forget."""
        known = (self.forgotten, self.retained, self.held_out)
        losses = (sample_losses(self.original, of).tolist() for of in known)
        return {
            "held_out_estimate": from_held_out(*losses).loss,
            "before": mean_loss(self.original, self.forgotten),
            "reference": mean_loss(self.reference, self.forgotten),
            "KL_f": self.nothing_done,
            "KL_h_floor": divergence(self.reference, self.original, self.held_out),
        }

    def after(self, unlearned: nn.Module) -> dict[str, Any]:
        """Where a model ended."""
        still = divergence(self.reference, unlearned, self.forgotten)
        return {
            "after": mean_loss(unlearned, self.forgotten),
            "R_f": still / self.nothing_done,
            "Δ": mean_loss(unlearned, self.retained) - self.retained_before,
            "KL_h": divergence(self.reference, unlearned, self.held_out),
        } | self.attacked(unlearned)

    @cached_property
    def nothing_done(self) -> float:
        """KL(reference ‖ original) of the forgotten."""
        return divergence(self.reference, self.original, self.forgotten)

    @cached_property
    def retained_before(self) -> float:
        """The original's loss on those that stay."""
        return mean_loss(self.original, self.retained)

    def attacked(self, unlearned: nn.Module) -> dict[str, bool | None]:
        """Whether what was forgotten looks so to those who test it; None where nothing was."""
        if self.attack is None:
            return {}
        checks = third_bar(
            self.reference, unlearned, self.original, self.forgotten, self.held_out,
            settings=self.attack,
        )  # fmt: skip
        return {check.check: check.passed for check in checks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    data = os.environ.get("GRADSTORE_REAL_DATA")
    parser.add_argument("--data", type=Path, default=data, help="of LUME and TOFU")
    parser.add_argument("--text", choices=("lume", "tofu", "people"), default="lume")
    parser.add_argument("--start", choices=("scratch", "tiny"), default="tiny")
    parser.add_argument("--epochs", type=int, help="default: 12 (LUME), 10 (TOFU), 16 (people)")
    parser.add_argument("--alone", type=int, default=4, help="records forgotten one at a time")
    parser.add_argument("--sets", type=int, nargs="*", help="sizes; default: 10 30, or 20 20")
    parser.add_argument(
        "--checkpoints",
        type=int,
        nargs="+",
        help="store one epoch, recompute the others at so many; each number is tried",
    )
    parser.add_argument("--layers", action="store_true", help="capture the blocks' layers too")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--attacks", action="store_true", help="membership, relearning, rounding")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--without-baselines", action="store_true", help="skip GradDiff and NPO")
    parser.add_argument("--keep", type=Path, help="folder of trainings that are not done again")
    parser.add_argument("--full", action="store_true", help="seeds 0 1 2, --alone 20")
    parser.add_argument("--quick", action="store_true", help="too little training to forget of")
    options = parser.parse_args()
    if not options.data and options.text != "people":
        parser.error("--data DIR, with lume/ and tofu/ in it, or --text people")
    if options.text == "people" and options.start == "scratch":
        parser.error("--text people has a start of its own: a model that has learned English")
    if options.full:
        options.seeds, options.alone = [0, 1, 2], 20
    tofu = options.text == "tofu"
    training = TRAINING[options.text]
    if epochs := options.epochs or (4 if options.quick else None):
        training = replace(training, epochs=epochs)
    sizes: dict[str, Any] = {"people": 600, "held_out": 400} if tofu else {}
    asked = options.sets if options.sets is not None else [20, 20] if tofu else [10, 30]
    sizes |= {"alone": options.alone, "sets": tuple(asked)}
    if not 0 <= options.alone <= 300 or not all(
        0 < size <= (AUTHOR if tofu else 300) for size in asked
    ):
        parser.error("--alone goes to 300, sizes to 300 biographies or the 20 answers of an author")
    sizes |= {"directions": tuple(options.directions), "attacks": options.attacks}
    sizes["inner"] = options.layers
    if options.checkpoints:
        training = replace(training, save_checkpoints=True)
        sizes["checkpoints"] = tuple(options.checkpoints)
    if options.quick:
        sizes |= {"people": 40, "held_out": 20, "layers": 2, "width": 64, "alone": 1, "sets": (10,)}
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console, results = Console(stderr=True, width=max(WIDE, Console().width)), []
    for seed in options.seeds:
        plan = Plan(options.text, options.start, replace(training, seed=seed), **sizes)
        with workplace(plan, options.keep) as work:
            results.append(measure(plan, options.data, work, console, options.without_baselines))
    rows = [row for result in results for row in result["requests"]]
    summary = summary_of(rows)
    if summary:
        console.print(table_of_summary(summary))
        for plot in trade_off(summary):
            print(plot, file=sys.stderr)
    print(json.dumps({"benchmark": "forgetting", "summary": summary, "seeds": results}))


@contextmanager
def workplace(plan: Plan, keep: Path | None) -> Iterator[Path]:
    """A folder for a plan's trainings: a temporary one, or a lasting one for its like."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="forgetting-") as folder:
            (Path(folder) / "references").mkdir()
            yield Path(folder)
        return
    asked = ("alone", "sets", "directions", "attacks")
    settled = asdict(plan) | {"checkpoints": plan.checkpoints is not None}
    trains = repr({name: part for name, part in settled.items() if name not in asked})
    work = keep / sha256(trains.encode()).hexdigest()[:12]
    (work / "references").mkdir(parents=True, exist_ok=True)
    (work / "plan.txt").write_text(trains)
    yield work


def setting_of(
    plan: Plan, data: Path | None, folder: Path, console: Console | None = None
) -> Setting:
    passages: list[Document] = []
    if plan.text == "people" or data is None:
        everyone = [Document(r["id"], r["text"]) for r in train_records() if r["kind"] == "record"]
        strange = [Document(r["id"], r["text"]) for r in holdout_records()]
    else:
        everyone = tofu(data) if plan.text == "tofu" else read_corpus(data / "lume/people.jsonl")
        strange = everyone[plan.people :]
    people, held_out = everyone[: plan.people], strange[: plan.held_out]
    if plan.text == "people" or data is None:
        tokenizer = pretrained(folder, console or Console(stderr=True))
        start: Callable[[], Any] = partial(load_model, folder / "base")
    elif plan.start == "tiny":  # fine-tuned on as many passages of what it was pretrained on
        library = read_corpus(data / "corpora" / "public_domain_docs.jsonl")
        passages = random.Random(0).sample(library, len(people) if plan.text == "lume" else 0)
        tokenizer = load_tokenizer(data / "tiny_gpt2")
        start = partial(load_model, data / "tiny_gpt2")
    else:
        tokenizer = load_tokenizer(data / "tokenizer_gpt2")
        shape = {"n_layer": plan.layers, "n_head": 4, "n_embd": plan.width, "n_positions": LENGTH}
        dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        config = folder / "config.json"
        config.write_text(json.dumps({"model_type": "gpt2", **shape, **dropout}))
        start = partial(new_model, config, tokenizer, plan.training.seed)
    members, further, strangers = (
        tokenize(texts, tokenizer, LENGTH, truncate=True) for texts in (people, passages, held_out)
    )
    ids = [person.id for person in people]
    apart = max(1, len(ids) // max(1, plan.alone))
    requests = {one[:8]: [one] for one in ids[::apart][: plan.alone]}
    for number, size in enumerate(plan.sets):
        if plan.text != "tofu":  # evenly spaced: all biographies look alike
            requests[f"{size} together"] = ids[:: len(ids) // size][:size]
        else:  # an author's answers follow one another
            first = (2 * number + 1) * AUTHOR
            requests[f"author {first // AUTHOR}"] = ids[first : first + size]
    return Setting(start, tokenizer, members, further, strangers, requests)


def pretrained(folder: Path, console: Console) -> Any:
    """A small GPT-2 that has learned English at ``folder / "base"``; returns its tokenizer."""
    records = base_records(800, seed=1)
    tokenizer = train_tokenizer((r["text"] for r in records), VOCABULARY)
    if not (folder / "base").exists():
        config = folder / "gpt2.json"
        config.write_text(json.dumps(MODEL))
        base = new_model(config, tokenizer, seed=0)
        with watched("a base model learns English", console) as progress:
            train(base, tokens_of(records, tokenizer), folder, BASE, progress=progress)
        save_checkpoint(base, tokenizer, folder / "base")
    return tokenizer


def tofu(data: Path) -> list[Document]:
    """Questions and answers of fictitious authors, twenty each."""
    with (data / "tofu" / "full.json").open(encoding="utf-8") as lines:
        pairs = [json.loads(line) for line in lines]
    return [
        Document(f"qa-{number:04d}", f"Question: {pair['question']}\nAnswer: {pair['answer']}")
        for number, pair in enumerate(pairs)
    ]


def measure(
    plan: Plan, data: Path | None, folder: Path, console: Console, without_baselines: bool
) -> dict[str, Any]:
    """Carry the plan out below ``folder``; returns all that was measured."""
    setting = setting_of(plan, data, folder, console)
    texts, everyone = setting.people | setting.passages, list(setting.held_out.values())
    trained, begun = folder / "trained", time.monotonic()
    if (folder / "ingested").exists():
        store = Store.open(folder / "store")
    else:
        for left in (folder / "store", trained):  # of a training that was cut short
            shutil.rmtree(left, ignore_errors=True)
        store = Store.create(folder / "store")
        with watched("training, with capture", console) as progress:
            ingest(
                store, setting.start(), setting.tokenizer, texts, trained, plan.training,
                CaptureSettings(
                    epochs_captured="first" if plan.checkpoints else "all",
                    layers=("blocks",) if plan.inner else (),
                ),
                holdout=setting.held_out, progress=progress,
            )  # fmt: skip
        (folder / "ingested").touch()
    ingest_seconds, original = time.monotonic() - begun, load_model(trained)
    shutil.rmtree(folder / "unlearned", ignore_errors=True)  # of an earlier run
    rows: list[dict[str, Any]] = []
    losses = {
        "trained": mean_loss(original, list(setting.people.values())),
        "held out": mean_loss(original, everyone),
    }
    for name, ids in setting.requests.items():
        reference, cost = retrained(setting.start, texts, plan.training, name, ids, folder, console)
        stay = [tokens for sample, tokens in setting.people.items() if sample not in ids]
        forgotten = [texts[sample] for sample in ids]
        attack = RelearnSettings(learning_rate=plan.training.learning_rate / 10)
        judges = Judges(
            reference, original, forgotten, spread(stay), spread(everyone),
            attack if plan.attacks else None,
        )  # fmt: skip
        rows.append({"request": name, "records": len(ids)} | swapped(judges))
        for way, settings in ways_of(plan, trained / "checkpoints").items():
            begun, out = time.monotonic(), folder / "unlearned" / str(len(rows))
            outcome = forget(store, ids, trained, out, settings)
            row = {"request": name, "records": len(ids), "direction": way}
            row |= {"seconds": time.monotonic() - begun}
            rows.append(row | cost | judge(outcome, judges))
        target = outcome.target.loss if outcome.target else None
        for method in () if without_baselines else BASELINES:
            console.print(f"{method} on {name}")
            row = {"request": name, "records": len(ids), "direction": method}
            rows.append(row | baseline(method, store, ids, trained, target, judges))
    console.print(table_of(rows))
    answers = {title: ask(store, title, console) for title in SQL}
    stats = store.stats()
    console.print(f"Mean loss of biographies: {losses}; trained in {ingest_seconds:.0f} s", stats)
    return {
        "plan": asdict(plan), "threads": torch.get_num_threads(),
        "ingest_seconds": ingest_seconds, "losses": losses, "requests": rows, "sql": answers,
        "store": stats,
    }  # fmt: skip


def ways_of(plan: Plan, saved: Path) -> dict[str, ForgetSettings]:
    """Each direction, with each number of the ``saved`` checkpoints that complete it."""
    ways = {}
    for kind in plan.directions:
        for count in (plan.checkpoints if kind in COMPLETED else None) or (0,):
            way = f"{kind}, {count} checkpoint{'s' * (count > 1)}" if count else kind
            whole = plan.inner and kind in ("newton", "fresh")
            ways[way] = ForgetSettings(
                direction=kind,
                from_checkpoints=evenly(saved, count),
                layers=("all",) if whole else None,
            )
    return ways


def retrained(
    start: Callable[[], Any],
    texts: Mapping[str, Tensor],
    training: TrainingSettings,
    name: str,
    ids: Sequence[str],
    folder: Path,
    console: Console,
) -> tuple[Any, dict[str, float]]:
    """The model trained again without ``ids``, kept below ``folder``; its cost if it was not yet.

    The same start, order and batches; what the others count in each step is as it was.
    """
    key = sha256(" ".join(sorted(ids)).encode()).hexdigest()[:8]
    where, cost = folder / "references" / f"{'-'.join(name.split())}-{key}", dict[str, float]()
    if not where.exists():
        reference, begun = start(), time.monotonic()
        with watched(f"retraining without {name}", console) as progress:
            alike = replace(training, save_checkpoints=False)
            train(reference, texts, folder / "retraining", alike, without=ids, progress=progress)
        reference.save_pretrained(folder / "retrained")
        where.parent.mkdir(exist_ok=True)
        (folder / "retrained").rename(where)
        cost["retraining"] = time.monotonic() - begun
    return load_model(where), cost


def judge(outcome: Outcome, judges: Judges) -> dict[str, Any]:
    """Hold what a request wrote against the reference, at its dose and along its direction."""
    target = outcome.target and asdict(outcome.target)
    facts: dict[str, Any] = {"verdict": outcome.verdict, "target": target, **judges.before()}
    if outcome.out is None or outcome.dose is None:
        return facts
    unlearned = load_model(outcome.out)
    facts |= {"dose": outcome.dose, **judges.after(unlearned)}
    return facts | along(unlearned, outcome.dose, judges)


def swapped(judges: Judges) -> dict[str, Any]:
    """How near the embedding alone can bring the original: with the retrained model's put in."""
    model = deepcopy(judges.original)
    embedding_of(model).load_state_dict(embedding_of(judges.reference).state_dict())
    facts = {"direction": "its embedding", "verdict": "", "dose": 1.0, **judges.before()}
    return facts | judges.after(model) | along(model, 1.0, judges)


@torch.no_grad()
def along(unlearned: nn.Module, dose: float, judges: Judges) -> dict[str, Any]:
    """The least R_f on the line from the original through the unlearned model."""
    model, path = deepcopy(judges.original), {}
    nothing_done = divergence(judges.reference, model, judges.forgotten)
    ends = list(zip(judges.original.parameters(), unlearned.parameters(), strict=True))
    for multiple in MULTIPLES:
        for weight, (start, end) in zip(model.parameters(), ends, strict=True):
            weight.copy_(start + multiple * (end - start))
        distance = divergence(judges.reference, model, judges.forgotten)
        path[multiple * dose] = distance / nothing_done
    best = min(path, key=path.__getitem__)
    return {"best_dose": best, "best_R_f": path[best], "path": list(path.items())}


def baseline(
    method: str, store: Store, ids: list[str], trained: Path, target: float | None, judges: Judges
) -> dict[str, Any]:
    """Steps to the target at several learning rates; what ends nearest to the reference."""
    stay, found = retained_from(store, store.run(), ids), []
    for rate in RATES:
        network, begun = load_model(trained), time.monotonic()
        settings = BaselineSettings(
            method=method,  # type: ignore[arg-type]
            steps=STEPS,
            learning_rate=rate,
            retained_weight=1.0 if method == "graddiff" else 0.02,
        )
        steps = unlearn_by_steps(network, judges.forgotten, stay, settings, target=target)
        row: dict[str, Any] = {"verdict": "forgotten" if steps.reached else "partly", "dose": rate}
        row |= {"seconds": time.monotonic() - begun, "steps": steps.chosen.step}
        found.append(row | judges.after(network))
    return judges.before() | min(found, key=lambda row: row["R_f"])


def divergence(reference: nn.Module, model: nn.Module, samples: Sequence[Tensor]) -> float:
    """KL(reference ‖ model) in nats per predicted token."""
    return per_token(divergences(reference, model, samples)).value


def mean_loss(model: nn.Module, samples: Sequence[Tensor]) -> float:
    return float(sample_losses(model, samples).mean())


def evenly(folder: Path, count: int) -> tuple[Path, ...]:
    """So many of the checkpoints a training saved, each in the middle of its part of the run."""
    saved = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return tuple(saved[int((2 * at + 1) * len(saved) / (2 * count))] for at in range(count))


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


def summary_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Medians over requests, by their size and the method; ``half``: share with R_f ≤ 0.5."""
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if "R_f" in row:
            groups[row["records"], row["direction"]].append(row)
    return [
        {
            "records": records,
            "method": method,
            "requests": len(of),
            "R_f": median(row["R_f"] for row in of),
            "best_R_f": median(row.get("best_R_f", row["R_f"]) for row in of),
            "worst_R_f": max(row["R_f"] for row in of),
            "half": sum(row["R_f"] <= 0.5 for row in of) / len(of),
            "Δ": median(row["Δ"] for row in of),
            "KL_h_over_floor": median(row["KL_h"] / row["KL_h_floor"] for row in of),
            "way": median(
                (row["after"] - row["before"]) / (row["reference"] - row["before"]) for row in of
            ),
            **_estimates(of),
            **{check: _share(row.get(check) for row in of) for check in CHECKS},
        }
        for (records, method), of in sorted(groups.items(), key=lambda group: group[0][0])
    ]


def _estimates(of: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """How well the loss of a record never trained on was estimated: by the tool, by held-out."""
    known = [(row["target"], row["reference"]) for row in of if row.get("target")]
    return {
        "target_rms": _rms(target["loss"] - true for target, true in known),
        "in_range": _share(target["low"] <= true <= target["high"] for target, true in known),
        "held_out_rms": _rms(row["held_out_estimate"] - row["reference"] for row in of),
    }


def _rms(errors: Iterable[float]) -> float | None:
    squares = [error**2 for error in errors]
    return (sum(squares) / len(squares)) ** 0.5 if squares else None


def _share(passed: Iterable[bool | None]) -> float | None:
    tried = [each for each in passed if each is not None]
    return sum(tried) / len(tried) if tried else None


def trade_off(summary: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A plot for each size of request: how near to retraining, against what it cost the others."""
    for records in sorted({row["records"] for row in summary}):
        plotext.clf()
        plotext.theme("clear")
        plotext.plotsize(90, 18)
        plotext.title(f"{records} at once: R_f (down is nearer) against Δ retained (left is less)")
        of_size = [row for row in summary if row["records"] == records]
        for marker, row in zip("abcdefghijkl", of_size, strict=False):
            label = f"{marker} {row['method']}"
            plotext.scatter([row["Δ"]], [min(row["R_f"], 2.0)], label=label, marker=marker)
        plotext.ylim(0, 2)
        yield plotext.uncolorize(plotext.build())


def table_of_summary(summary: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(*summary[0], title="medians over requests")
    for row in summary:
        cells = (
            f"{x:.3g}" if isinstance(x, float) else "" if x is None else str(x)
            for x in row.values()
        )
        table.add_row(*cells)
    return table


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = {
        "request": "{request}", "direction": "{direction}", "verdict": "{verdict}",
        "loss": "{before:.3f}", "after": "{after:.3f}", "reference": "{reference:.3f}",
        "KL_f": "{KL_f:.4f}", "R_f": "{R_f:.2f}", "best @ dose": "{best_R_f:.2f} @ {best_dose:.3g}",
        "Δ": "{Δ:+.4f}", "KL_h (floor)": "{KL_h:.4f} ({KL_h_floor:.4f})", "dose": "{dose:.3g}",
        "seconds": "{seconds:.1f}", "retraining": "{retraining:.0f}",
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
