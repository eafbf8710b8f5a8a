"""What keeping every gradient costs: time while training, bytes on disk, exactness, throughput.

    python benchmarks/capture.py --quick                # two minutes on two cores
    python benchmarks/capture.py                        # a quarter of an hour
    python benchmarks/capture.py --data ../shared/data  # real text instead of synthetic

GPT-2 with 4 layers of 256, V = 50,257, tied, T = 128, B = 8, AdamW, in a plain loop. Everything is
held against its baseline by turns in the same run, in CPU time: of one thread for the work, and on
top what other threads (the writer's, DuckDB's) add to it. Ratios are medians over the turns.

Progress and tables go to stderr, one line of JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"  # read once, when torch is imported

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import gradstore
from gradstore import Store
from gradstore.capture import assemble, compact, recorder
from gradstore.capture.measure import measure_head
from gradstore.capture.taps import Pass, Taps
from gradstore.store.arrays import write_array
from gradstore.store.segment import SegmentReader
from gradstore.store.writer import SegmentWriter
from gradstore.training.corpus import read_corpus
from gradstore.training.model import load_tokenizer

VOCABULARY, LENGTH, BATCH, WIDTH = 50_257, 128, 8, 256
SCANNED = 4096  # rows read at once
PARTS = ((recorder, "measure_head"), (compact, "position_facts"), (compact, "compact"),
         (compact, "largest"), (recorder, "records_of"), (assemble, "relative_error"))  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How much is measured: captured steps before comparing, pairs of steps, repeats of I/O."""

    training: int = 320
    pairs: int = 64
    repeats: int = 25


@dataclass(frozen=True)
class Result:
    """One number, and the bound it should keep to."""

    section: str
    name: str
    value: float
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the bound is kept; empty where there is none."""
        if self.at_most is None and self.at_least is None:
            return ""
        high = self.at_most is not None and self.value > self.at_most
        low = self.at_least is not None and self.value < self.at_least
        return "MISS" if high or low else "PASS"


@dataclass
class Times:
    """CPU seconds of training steps: in pairs, then what capture adds to each on average."""

    plain: list[float] = field(default_factory=list)
    captured: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    on_top: float = 0.0  # of a captured step, in other threads or too rarely for a median
    run: float = 0.0  # once a run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("GRADSTORE_REAL_DATA"))
    parser.add_argument("--quick", action="store_true", help="fewer steps and repeats")
    options = parser.parse_args()
    plan = Plan(48, 18, 9) if options.quick else Plan()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="capture-") as folder:
        times, results = measure(plan, options.data, Path(folder), console)
    console.print(table_of_parts(times), table_of(results))
    facts = {"benchmark": "capture", "text": str(options.data or "synthetic"), "plan": asdict(plan)}
    kept = [asdict(result) | {"verdict": result.verdict} for result in results]
    steps = {sides: asdict(seen) for sides, seen in times.items()}
    print(json.dumps({**facts, "cores": os.cpu_count(), "times": steps, "results": kept}))


def measure(
    plan: Plan, data: Path | None, folder: Path, console: Console
) -> tuple[dict[str, Times], list[Result]]:
    batches = real_batches(data) if data else synthetic_batches()
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=4, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stores = {name: Store.create(folder / name) for name in ("both", "input only")}
    plans = {"both": plan, "input only": Plan(2, max(8, plan.pairs // 2))}
    times = {
        sides: train(model, optimizer, batches, store, plans[sides], sides.split()[0], console)
        for sides, store in stores.items()
    }
    results = [result for sides, seen in times.items() for result in ratios(seen, sides)]
    copies = {
        profile: copy(stores["both"], folder / profile, profile) for profile in ("packed", "raw")
    }
    results += size(stores["both"], "both sides", 300) + size(copies["packed"], "input side", 700)
    results += recorded_errors(stores["both"]) + errors_by_k(model, next(batches))
    console.print("writing and reading")
    for profile, store in copies.items():
        matrix = SegmentReader(segment_path(store)).tensor("D")
        results += appending(matrix, folder, profile, plan.repeats)
        results += scanning(store, folder, profile, plan.repeats)
        results += by_id(store, f"input side, {profile}", plan.repeats)
    return times, results + by_id(stores["both"], "both sides, packed", plan.repeats)


# -- the text ---------------------------------------------------------------------------------


def synthetic_batches() -> Iterator[Tensor]:
    """Zipf's law with habits: 6 times in 10 a token is followed by one of its few successors."""
    generator = np.random.default_rng(0)
    cumulative = np.cumsum(1 / np.arange(1, VOCABULARY + 1))

    def draw(*shape: int) -> np.ndarray:
        return np.asarray(np.searchsorted(cumulative, generator.random(shape) * cumulative[-1]))

    successors = draw(VOCABULARY, 8)
    while True:
        tokens, habit = draw(BATCH, LENGTH), generator.random((LENGTH, BATCH)) < 0.6
        for t in range(1, LENGTH):
            usual = successors[tokens[:, t - 1], generator.integers(0, 8, BATCH)]
            tokens[:, t] = np.where(habit[t], usual, tokens[:, t])
        yield torch.from_numpy(tokens)


def real_batches(data: Path) -> Iterator[Tensor]:
    """Passages of public-domain books, shuffled and joined, cut into samples of equal length."""
    passages = read_corpus(data / "corpora" / "public_domain_docs.jsonl")
    random.Random(0).shuffle(passages)
    tokenizer, held = load_tokenizer(data / "tokenizer_gpt2"), list[int]()
    for passage in passages:
        held += tokenizer(passage.text, verbose=False)["input_ids"]
        while len(held) >= BATCH * LENGTH:
            yield torch.tensor(held[: BATCH * LENGTH]).view(BATCH, LENGTH)
            del held[: BATCH * LENGTH]


# -- 1. training with and without capture -----------------------------------------------------


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Tensor], store: Store,
    plan: Plan, sides: str, console: Console,
) -> Times:  # fmt: skip
    """Train on: captured steps, then pairs of a step with capture and one without."""

    def step(**ids: list[str]) -> float:
        tokens, begun = next(batches), time.thread_time()
        model(input_ids=tokens, labels=tokens, **ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.thread_time() - begun

    seen, total = Times(), plan.training + plan.pairs
    with watched() as calls:
        options: dict[str, Any] = {"sides": sides, "epochs_captured": "all"}
        with gradstore.capture(model, store, optimizer, **options) as capture:
            begun, own = time.process_time(), time.thread_time()
            title = f"training, capturing {sides}"
            for number in track(range(total), title, console=console, auto_refresh=False):
                ids = [f"{number}-{row}" for row in range(BATCH)]
                if number < plan.training:
                    step(sample_ids=ids)
                elif number % 2:
                    seen.plain.append(step())
                    seen.captured.append(step(sample_ids=ids))
                else:
                    seen.captured.append(step(sample_ids=ids))
                    seen.plain.append(step())
            capture.flush()
            others = time.process_time() - begun - (time.thread_time() - own)
            begun = time.process_time()
        seen.run = time.process_time() - begun
    spent = {name: median(calls[name] or [0.0]) for _, name in PARTS}
    error = spent["relative_error"] / recorder.ERROR_EVERY
    seen.on_top = others / total + error
    seen.parts = {
        "selecting the k largest of R": spent["largest"],
        "compacting the rest of R": spent["compact"] - spent["largest"],
        "shares and losses": spent["position_facts"],
        "the rest at the head": spent["measure_head"] - spent["compact"] - spent["position_facts"],
        "records: D, H and R to the host, norms": spent["records_of"],
        "error of one record in 512, averaged": error,
        "writer and catalog, other threads": others / total,
    }
    return seen


@contextmanager
def watched() -> Iterator[dict[str, list[float]]]:
    """CPU seconds of every call of ``PARTS`` in this thread; a call within itself counts once."""
    calls: dict[str, list[float]] = defaultdict(list)
    open_calls: set[str] = set()

    def timed(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if name in open_calls:
                return inner(*args)
            open_calls.add(name)
            begun = time.thread_time()
            result = inner(*args)
            result = list(result) if isinstance(result, Iterator) else result
            calls[name].append(time.thread_time() - begun)
            open_calls.remove(name)
            return result

        return call

    with ExitStack() as stack:
        for home, name in PARTS:
            stack.enter_context(patch.object(home, name, timed(name, getattr(home, name))))
        yield calls


def ratios(seen: Times, sides: str) -> list[Result]:
    pairs = zip(seen.captured, seen.plain, strict=True)
    each = [(captured + seen.on_top) / plain for captured, plain in pairs]
    low, middle, high = quantiles(each, n=4)
    note = f"quartiles {low:.3f}–{high:.3f}, {len(each)} pairs; a run ends with {seen.run:.2f} s"
    bound = 1.05 if sides == "both" else None
    parts = 1 + sum(seen.parts.values()) / median(seen.plain)
    return [
        Result("training", f"with capture ÷ without, {sides}", middle, bound, note=note),
        Result("training", "  reckoned from capture's parts", parts, note="less noise; see above"),
    ]


# -- 2. bytes on disk -------------------------------------------------------------------------


def copy(store: Store, path: Path, profile: str) -> Store:
    """The input sides of a store's records as a store of their own."""
    new = Store.create(path, profile=profile)
    new.bind(store.model, "the copy")
    run = new.begin_run({"name": "copy", "epochs_captured": "all", "sides": "input", "top_k": 0})
    writer = SegmentWriter(new, run)
    numbers = [number for (number,) in store.rows("SELECT sample_id FROM samples")]
    for record in store.records(numbers, store.run()["run_id"]):
        writer.put([replace(record, output=None)])
    writer.close()
    return new


def size(store: Store, name: str, bound: float) -> list[Result]:
    facts = store.stats()
    each = facts["dense_float32_bytes"] / facts["times_smaller"]
    copies = (facts["store_bytes"] - facts["moment_bytes"]) / facts["gradients"]
    note = (
        f"{each:,.0f} B a gradient of {facts['gradients']}, with its share of the catalog; "
        f"{copies:,.0f} B with the published copies of that"
    )
    smaller = facts["times_smaller"]
    return [Result("size", f"dense float32 ÷ stored, {name}", smaller, at_least=bound, note=note)]


# -- 3. what compaction loses -----------------------------------------------------------------


def recorded_errors(store: Store) -> list[Result]:
    rows = store.rows(
        "SELECT step, relative_error FROM exposures WHERE relative_error IS NOT NULL ORDER BY step"
    )
    late = [error for step, error in rows if 2 * step >= rows[-1][0]]
    curve = ", ".join(f"{error:.4f} at {step}" for step, error in rows)
    return [
        Result("error", "as recorded, later half, median", median(late), 0.02, note=curve),
        Result("error", "as recorded, later half, largest", max(late), 0.02),
    ]


def errors_by_k(model: nn.Module, tokens: Tensor) -> list[Result]:
    """Error of every record of one batch, at several k."""
    seen: list[tuple[Pass, Tensor]] = []
    taps = Taps(model, lambda *head: seen.append(head), lambda *embedding: seen.append(embedding))
    ids = [str(row) for row in range(BATCH)]
    model(input_ids=tokens, labels=tokens, sample_ids=ids).loss.backward()
    taps.remove()
    model.zero_grad()
    (one, head), (_, embedding) = seen
    assert one.hidden is not None
    results, moment = [], assemble.Moment(1, 1, 0.0, 1, True, torch.bfloat16, None)
    for k in (16, 32, 64, 128):
        facts = measure_head(one, head, k, keep_exact=False)
        own = (1 / facts.share)[:, None, None]
        records = assemble.records_of(one, facts, embedding, moment, lambda _: True)
        exact = zip(records, embedding * own, one.hidden, head * own, strict=True)
        errors = [
            assemble.relative_error(record, D[:-1], H[:-1], R[:-1], tied=True)
            for record, D, H, R in exact
        ]
        bound, note = 0.02 if k == recorder.TOP_K else None, f"median {median(errors):.4f}"
        name = f"k = {k}, largest of a batch, trained"
        results.append(Result("error", name, max(errors), bound, note=note))
    return results


# -- 4. against raw files ---------------------------------------------------------------------


class Undigested:
    """In place of a digest, to see what the digest costs."""

    def update(self, piece: object) -> None:
        """Do nothing."""

    def hexdigest(self) -> str:
        """Nothing."""
        return ""


def appending(matrix: Tensor, folder: Path, profile: str, repeats: int) -> list[Result]:
    """Writing one array durably, with the digest that a manifest needs and without."""
    data, target, plain = matrix.view(torch.int16).numpy(), folder / "array", folder / "plain"

    def clear() -> None:
        plain.unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)

    def raw() -> None:
        with open(plain, "xb", buffering=0) as file:
            file.write(data.data.cast("B"))
            os.fsync(file.fileno())

    def ours() -> None:
        write_array(target, data, profile)

    def undigested() -> None:
        with patch("hashlib.sha256", Undigested):
            write_array(target, data, profile)

    bound = 0.9 if profile == "raw" else None
    quick, whole = (speed(raw, way, repeats, clear) for way in (undigested, ours))
    note = f"{whole:.2f} with SHA-256; {data.nbytes / 1e6:.0f} MB, fsynced"
    return [Result("files", f"append, {profile}: raw file's CPU ÷ ours", quick, None, bound, note)]


def scanning(store: Store, folder: Path, profile: str, repeats: int) -> list[Result]:
    """Reading D of a segment a few thousand rows at a time, from the page cache into memory."""
    plain, reader = folder / "scanned", SegmentReader(segment_path(store))
    matrix = reader.tensor("D").view(torch.int16).numpy()
    matrix.tofile(plain)
    blocks = [(at, min(at + SCANNED, len(matrix))) for at in range(0, len(matrix), SCANNED)]

    def raw() -> None:
        with open(plain, "rb", buffering=0) as file:
            for start, stop in blocks:
                file.readinto(np.empty((stop - start, WIDTH), np.int16).data.cast("B"))

    def ours() -> None:
        for start, stop in blocks:
            reader.tensor("D", start, stop)

    bound = 0.9 if profile == "raw" else 0.25
    name, ratio = f"scan of D, {profile}: raw file's CPU ÷ ours", speed(raw, ours, repeats)
    return [Result("files", name, ratio, None, bound, f"{SCANNED} rows at a time")]


def by_id(store: Store, name: str, repeats: int) -> list[Result]:
    """One record by its id, as a request reads it: catalog, then arrays; all of it warm."""
    run, rows = store.run()["run_id"], store.rows("SELECT id FROM samples ORDER BY hash(id)")
    finding, whole = [], []
    for (sample,) in rows[: 10 * repeats]:
        begun = time.perf_counter()
        numbers = list(store.resolve([sample]).values())
        finding.append(time.perf_counter() - begun)
        assert list(store.records(numbers, run))
        whole.append(time.perf_counter() - begun)
    resolved, read = (1e3 * median(times[repeats:]) for times in (finding, whole))
    note = f"of which finding the sample {resolved:.2f} ms"
    return [Result("files", f"one record by id, ms, {name}", read, note=note)]


def speed(
    raw: Callable[[], object], ours: Callable[[], object], repeats: int,
    clear: Callable[[], None] = lambda: None,
) -> float:  # fmt: skip
    """CPU seconds of ``raw`` ÷ those of ``ours``, by turns."""
    each = []
    for _ in range(repeats + 1):  # the first warms up
        taken = []
        for way in (raw, ours):
            clear()
            begun = time.process_time()
            way()
            taken.append(time.process_time() - begun)
        each.append(taken[0] / taken[1])
    clear()
    return median(each[1:])


def segment_path(store: Store) -> Path:
    """The first segment of gradients."""
    return store.root / str(store.rows("SELECT path FROM segments WHERE kind = 'gradients'")[0][0])


# -- tables -----------------------------------------------------------------------------------


def table_of_parts(times: dict[str, Times]) -> Table:
    table = Table("CPU ms a step", *times, title="where the time of capture goes")
    for part in times["both"].parts:
        table.add_row(part, *(f"{1e3 * seen.parts[part]:.1f}" for seen in times.values()))
    for name in ("plain", "captured"):
        medians = (f"{1e3 * median(getattr(seen, name)):.0f}" for seen in times.values())
        table.add_row(f"a {name} step, median", *medians)
    return table


def table_of(results: Iterable[Result]) -> Table:
    table = Table("", "measured", "target", "", "", title="gradstore against its targets")
    for result in results:
        bounds = (("≤", result.at_most), ("≥", result.at_least))
        target = " ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
        measured = f"{result.value:.5g}"
        table.add_row(result.name, measured, target, result.verdict, result.note)
    return table


if __name__ == "__main__":
    main()
