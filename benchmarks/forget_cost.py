"""What forgetting one record costs beside training again: a GPT-2 small, seconds and their ratios.

    python benchmarks/forget_cost.py --quick   # under two minutes on two cores: one epoch
    python benchmarks/forget_cost.py           # three epochs, some minutes

A model of GPT-2 small's shape (124M parameters, V = 50,257, d = 768, random weights made from a
config) is trained on 80 records of 128 random tokens, and the store keeps their gradients of all
epochs. Then, in the same process: looking one id up in the freshly opened store and making its
direction by `applied`, by `newton` of the embedding, held by as many records as `forget` takes, and
one plain optimizer step of the same batch. What `newton` of the whole model takes for its products
with the curvature is reckoned from one of a batch of records, times those that `forget` takes and
the iterations it takes at most; its look-up and vectors come on top. Training again
takes as many such steps as the epochs that the direction replaces have: those of the run, and those
of a run on `--records` records. Look-up by `applied` and step are measured by turns; ratios are of
processor seconds, medians over the turns. Not counted, since both would do them: loading the model,
measuring what came of it, writing a checkpoint.

Progress and a table go to stderr, one line of JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from gradstore import GradStoreCallback, Store
from gradstore.capture.layers import parameter
from gradstore.influence.curvature import GaussNewton
from gradstore.training.ingest import TrainingSettings, train
from gradstore.unlearn.applied import applied
from gradstore.unlearn.find import HELD, HELD_INSIDE
from gradstore.unlearn.held import Held
from gradstore.unlearn.newton import ITERATIONS, newton

ID = "r-05"  # the record to be forgotten
BAR = 100.0  # times cheaper than training again
WAYS = {
    "applied": "look-up and direction, applied",
    "newton": "look-up and direction, newton",
    "newton_whole": "products of newton, whole model",
}
WIDE = 160  # columns, for a table that is not cut


@dataclass(frozen=True)
class Plan:
    """The model's shape, and how much is trained and measured."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50_257
    length: int = 128
    count: int = 80
    batch: int = 8
    epochs: int = 3
    held: int = HELD["newton"]
    few: int = 5  # records of one product with the whole model's curvature: a batch
    turns: int = 3
    records: int = 1000  # of the run that is trained again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, help="captured and replaced; default 3, --quick 1")
    parser.add_argument("--records", type=int, default=1000, help="of a run that is trained again")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    sizes: dict[str, Any] = (
        {"epochs": 1, "held": 2, "turns": 2, "count": 16} if options.quick else {}
    )
    if options.epochs:
        sizes["epochs"] = options.epochs
    console = Console(stderr=True, width=max(WIDE, Console().width))
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Plan(**sizes, records=options.records), Path(folder), console)
    console.print(table_of(found))
    print(json.dumps({"benchmark": "forget_cost", **found}))


def measure(plan: Plan, folder: Path, console: Console) -> dict[str, Any]:
    """Carry the plan out below ``folder``; returns seconds and ratios."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=plan.vocabulary, n_positions=plan.length, n_embd=plan.width,
        n_layer=plan.layers, n_head=plan.heads, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    drawn = torch.randint(plan.vocabulary, (plan.count, plan.length))
    tokens = {f"r-{number:02d}": row for number, row in enumerate(drawn)}
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters; training, captured")
    settings = TrainingSettings(epochs=plan.epochs, batch_size=plan.batch, learning_rate=1e-4)
    begun = time.perf_counter()
    with GradStoreCallback(folder / "store", epochs_captured="all") as callback:
        train(model, tokens, folder / "out", settings, [callback])
    ingest = time.perf_counter() - begun
    model.eval()

    console.print("looking up, and making directions")

    def look_up(make: Callable[[Store, dict[str, Any], list[int]], Any]) -> None:
        store = Store.open(folder / "store")
        numbers = list(store.resolve([ID]).values())
        found = make(store, store.run(), numbers)
        assert found.exposures == plan.epochs
        assert bool(found.update.any())

    def by_newton(store: Store, run: dict[str, Any], numbers: list[int]) -> Any:
        held = [n for n in store.resolve(list(tokens)).values() if n not in numbers]
        return newton(store, run, numbers, model, Held(others=held[: plan.held]))

    first, curved = timed(lambda: look_up(applied)), timed(lambda: look_up(by_newton))
    names = inner_of(model)
    v = torch.randn(sum(parameter(model, name).numel() for name in names))
    of_few = GaussNewton(model, [*drawn[: plan.few]], names)
    products = typical([timed(lambda: of_few(v)) for _ in range(plan.turns)])
    step, batch = stepper(model), drawn[: plan.batch]
    step(batch)  # to warm up
    turns = [
        (timed(lambda: look_up(applied)), timed(lambda: step(batch))) for _ in range(plan.turns)
    ]
    found = {
        "applied_first": first, "newton": curved,
        "newton_whole": reckoned(products, plan.few),
        "applied": typical([applied for applied, _ in turns]),
        "step": typical([of_step for _, of_step in turns]),
    }  # fmt: skip
    cost = {name: times.processor for name, times in found.items()}
    steps = {  # of the epochs replaced
        "this run": plan.epochs * math.ceil(plan.count / plan.batch),
        "records": plan.epochs * math.ceil(plan.records / plan.batch),
    }
    return {
        "plan": asdict(plan),
        "threads": torch.get_num_threads(),
        "ingest_seconds": ingest,
        "seconds": {name: times.wall for name, times in found.items()},
        "processor_seconds": cost,
        "retraining_processor_seconds": {of: n * cost["step"] for of, n in steps.items()},
        "ratios": {
            of: {name: n * cost["step"] / cost[name] for name in WAYS} for of, n in steps.items()
        },
        "records_for_the_bar": {
            name: plan.batch * math.ceil(BAR * cost[name] / cost["step"] / plan.epochs)
            for name in WAYS
        },
        "passed": {
            "100 times": steps["records"] * cost["step"] >= BAR * cost["applied"],
            "1 second": found["applied"].wall <= 1.0,
        },
    }


def inner_of(model: nn.Module) -> list[str]:
    """The weights that `newton` moves where the blocks' layers are captured too."""
    return ["embedding", *(name for name, _ in model.named_parameters() if ".c_" in name)]


@dataclass(frozen=True)
class Times:
    """Seconds that something took: on the clock, and of all processors."""

    wall: float
    processor: float


def timed(work: Callable[[], object]) -> Times:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return Times(time.perf_counter() - wall, time.process_time() - processor)


def typical(turns: Sequence[Times]) -> Times:
    return Times(median(t.wall for t in turns), median(t.processor for t in turns))


def reckoned(product: Times, few: int) -> Times:
    """All products of `newton`, from one with the curvature of ``few`` records."""
    times = ITERATIONS * HELD_INSIDE / few
    return Times(product.wall * times, product.processor * times)


def stepper(model: nn.Module) -> Callable[[Tensor], None]:
    """What takes a plain optimizer step on a batch."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(batch: Tensor) -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def table_of(found: dict[str, Any]) -> Table:
    plan, seconds, processor = found["plan"], found["seconds"], found["processor_seconds"]
    runs = {"this run": plan["count"], "records": plan["records"]}
    again = [f"training again on {n:,}" for n in runs.values()]
    title = f"one record, met in {plan['epochs']} epochs; {found['threads']} threads"
    enough = f"{BAR:.0f} times cheaper from"
    table = Table("", "seconds", "of processors", *again, enough, title=title)

    def row(what: str, name: str, *cells: str) -> None:
        times = f"{seconds[name]:.2f}", f"{processor[name]:.2f}"
        table.add_row(what, *times, *cells, *[""] * (len(runs) + 1 - len(cells)))

    for name, way in WAYS.items():
        ratios = (f"{found['ratios'][of][name]:.1f} times cheaper" for of in runs)
        row(way, name, *ratios, f"{found['records_for_the_bar'][name]:,} records")
    row("the first time, applied", "applied_first")
    row(f"one step of {plan['batch']} records", "step")
    of_all = (f"{found['retraining_processor_seconds'][of]:.0f} seconds" for of in runs)
    table.add_row("training again", "", "", *of_all, "")
    return table


if __name__ == "__main__":
    main()
