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
beaten  the share of requests in which some dose of newton ends as near as the method or nearer, and
        harms those that stay no more
way     how far the loss went towards the reference's; end_rms: how far from it the losses ended
target_rms  error of the loss that the tool estimates for a record never trained on; in_range: how
        often the reference's lies in its range; held_out_rms: error of carrying the members' losses
        onto the held-out ones

With --layers the store keeps the blocks' gradients too, and newton and fresh move the whole model
(newton all but positions), newton the embedding alone as well.
With --checkpoints N ... it keeps the first epoch only, and directions that undo steps are made once
for each N, the other epochs recomputed at so many checkpoints.

With --attacks also which requests pass for retrained: membership (AUC of the forgotten against the
held-out within the reference's interval), relearning (no faster than the reference), rounding (to
bfloat16 and int8 changes no verdict).

Of several seeds each request's reference is also held against that of the next seed, which met the
same records in another order (--start scratch: from another start): how near, and how much alike, a
second retraining would be.

Progress and tables go to stderr, one line of JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from retraining.judges import Judges, another, compare, judge, mean_loss, spread, swapped
from retraining.setting import AUTHOR, TRAINING, Plan, retrained, setting_of, watched, workplace
from retraining.tables import WIDE, summary_of, table_of, table_of_summary, trade_off
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from gradstore import Store
from gradstore.evaluate.attacks import RelearnSettings
from gradstore.training.ingest import CaptureSettings, ingest
from gradstore.training.model import load_model
from gradstore.unlearn.baselines import BaselineSettings, retained_from, unlearn_by_steps
from gradstore.unlearn.direction import DIRECTIONS
from gradstore.unlearn.forget import ForgetSettings, forget

BASELINES, RATES, STEPS = ("graddiff", "npo"), (3e-5, 1e-4, 3e-4), 60
COMPLETED = ("applied", "newton", "orthogonal")  # by checkpoints, where epochs were not captured
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    data = os.environ.get("GRADSTORE_REAL_DATA")
    parser.add_argument("--data", type=Path, default=data, help="of LUME and TOFU")
    parser.add_argument("--text", choices=("lume", "tofu", "people"), default="lume")
    parser.add_argument("--start", choices=("scratch", "tiny"), default="tiny")
    parser.add_argument("--epochs", type=int, help="default: 12 (LUME), 10 (TOFU), 16 (people)")
    parser.add_argument("--learning-rate", type=float, help="default: 1.5e-3, 1e-3, 4e-3")
    parser.add_argument("--batch-size", type=int, help="default: 16, 12, 8")
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
    if options.learning_rate:
        training = replace(training, learning_rate=options.learning_rate)
    if options.batch_size:
        training = replace(training, batch_size=options.batch_size)
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
    judges = [result.pop("judges") for result in results]
    for result, mine, others in zip(results, judges, [*judges[1:], judges[0]], strict=True):
        for name, of in mine.items() if mine is not others else ():
            row = {"request": name, "records": len(of.forgotten)}
            result["requests"].append(row | another(of, others[name].reference))
    rows = [row for result in results for row in result["requests"]]
    summary = summary_of(rows)
    if summary:
        console.print(table_of_summary(summary))
        for plot in trade_off(summary):
            print(plot, file=sys.stderr)
    print(json.dumps({"benchmark": "forgetting", "summary": summary, "seeds": results}))


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
    judged: dict[str, Judges] = {}
    losses = {
        "trained": mean_loss(original, list(setting.people.values())),
        "held out": mean_loss(original, everyone),
    }
    for name, ids in setting.requests.items():
        reference, cost = retrained(setting.start, texts, plan.training, name, ids, folder, console)
        stay = [tokens for sample, tokens in setting.people.items() if sample not in ids]
        forgotten = [texts[sample] for sample in ids]
        attack = RelearnSettings(learning_rate=plan.training.learning_rate / 10)
        judged[name] = judges = Judges(
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
        compare([row for row in rows if row["request"] == name])
    console.print(table_of(rows))
    answers = {title: ask(store, title, console) for title in SQL}
    stats = store.stats()
    console.print(f"Mean loss of biographies: {losses}; trained in {ingest_seconds:.0f} s", stats)
    return {
        "plan": asdict(plan), "threads": torch.get_num_threads(),
        "ingest_seconds": ingest_seconds, "losses": losses, "requests": rows, "sql": answers,
        "store": stats, "judges": judged,
    }  # fmt: skip


def ways_of(plan: Plan, saved: Path) -> dict[str, ForgetSettings]:
    """Each direction, with each number of the ``saved`` checkpoints that complete it."""
    ways = {}
    for kind in plan.directions:
        for count in (plan.checkpoints if kind in COMPLETED else None) or (0,):
            way = f"{kind}, {count} checkpoint{'s' * (count > 1)}" if count else kind
            ways[way] = ForgetSettings(
                direction=kind,
                from_checkpoints=evenly(saved, count),
                layers=("all",) if plan.inner and kind == "fresh" else None,
            )
            if plan.inner and kind == "newton":
                ways[f"{way}, embedding"] = replace(ways[way], layers=("embedding",))
    return ways


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


def evenly(folder: Path, count: int) -> tuple[Path, ...]:
    """So many of the checkpoints a training saved, each in the middle of its part of the run."""
    saved = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return tuple(saved[int((2 * at + 1) * len(saved) / (2 * count))] for at in range(count))


def ask(store: Store, title: str, console: Console) -> list[dict[str, Any]]:
    columns, answer = store.query(SQL[title])
    table = Table(*columns, title=title)
    for row in answer:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print(table)
    return [dict(zip(columns, row, strict=True)) for row in answer]


if __name__ == "__main__":
    main()
