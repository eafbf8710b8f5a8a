"""What scoring stored gradients against a query costs, all of them or those that sketches find.

    python benchmarks/influence_scan.py --quick   # a minute
    python benchmarks/influence_scan.py
    python benchmarks/influence_scan.py --data ../shared/data   # and recall, on LUME biographies

One segment of synthetic records shaped as GPT-2 small's (V = 50,257, d = 768, T = 128, the 64
largest entries of R, tokens and entries drawn by Zipf's law), one thread, warm. Everything is timed
by turns in one process, in CPU time; ratios are medians over the turns.

read       the arrays' files memory-mapped and copied, a few hundred rows at a time
thin       a completion of 8 tokens after 16: rank 32
text       a text of 128 tokens: rank 254
dense      a query divided by Adam's moments: (V, d)
exact      thin, with products in float32 in place of bfloat16, as where the processor has none
input      thin and dense, the records' input side alone, held against reading its files alone
kernels    what thin queries cannot do without: D and H multiplied with W, rows of L looked up;
           from memory into memory, without files and scores
sketch     making the records' sketches, of the default size
coarse     one query against a million synthetic sketches (--quick: a tenth), held against copying
           their bytes in the same blocks
error      of cosines in either precision, and the share of the ten highest that are so by dense
           matrices in float64 too: the records of recall, asked about the ends of held-out ones
recall     of the ten records whose scores are highest by a whole scan, the share among the N that
           sketches of a size nominate, whole ones or reduced: a pretrained model trained for an
           epoch on biographies and 8,764 passages (--quick: 100); asked about stored records, and
           about the ends of held-out biographies

Progress and tables go to stderr, one line of JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read once, when torch is imported

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import embedding_bag
from transformers.utils import logging

from gradstore import Store
from gradstore.factored import FactoredGradient, Term
from gradstore.influence.lens import Lens, lenses, precision_for
from gradstore.influence.nominate import nominated, open_search
from gradstore.influence.norms import norms_segment
from gradstore.influence.query import Checkpoint, of_sample
from gradstore.influence.rows import Place
from gradstore.influence.scan import score_segment
from gradstore.influence.sketch import Projection
from gradstore.influence.sketches import SIZE, Sketches, sketch
from gradstore.influence.top import Settings, influences
from gradstore.store.record import Exposure, OutputSide, Record
from gradstore.store.segment import SegmentReader, pack, write_segment
from gradstore.training.corpus import read_corpus, tokenize
from gradstore.training.ingest import CaptureSettings, TrainingSettings, ingest
from gradstore.training.model import load_model, load_tokenizer

V, WIDTH, LENGTH, KEPT, BATCH = 50_257, 768, 128, 64, 8
BLOCK = 512  # rows read at once
READ_AT_MOST, MANY_AT_MOST = 2.0, 8.0  # times reading, times one query
QUERIES = 64
NOMINATED = (10, 25, 50, 100, 200)
METHODS = {"dot": Settings("dot"), "cosine": Settings("cosine")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer records and turns")
    parser.add_argument("--data", type=Path, default=os.environ.get("GRADSTORE_REAL_DATA"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    records, turns = (128, 3) if options.quick else (512, 7)
    console, results = Console(stderr=True), []
    with tempfile.TemporaryDirectory(prefix="influence-") as folder:
        for profile in ("raw", "packed"):
            results += measure(Path(folder) / profile, profile, records, turns)
    table = Table("profile", "what", "value", "bound", title=f"{records} records, one thread")
    for row in results:
        bound = row.get("at_most")
        told = "" if bound is None else f"{'≤' if row['value'] <= bound else 'MISSES'} {bound:g}"
        table.add_row(row["profile"], row["name"], f"{row['value']:.3g}", told)
    console.print(table)
    results += coarse(options.quick, console)
    if options.data:
        with tempfile.TemporaryDirectory(prefix="recall-") as folder:
            results += recall(options.data, Path(folder), options.quick, console)
    else:
        console.print("no recall: it takes --data")
    print(json.dumps({"benchmark": "influence_scan", "records": records, "results": results}))


def measure(folder: Path, profile: str, count: int, turns: int) -> list[dict[str, Any]]:
    path, places = segment(folder, profile, count)
    fast = precision_for("bfloat16")
    one, exact = (list(lenses([query(16 + 8, 8)], None, how)) for how in (fast, "float32"))
    many = list(lenses([query(16 + 8, 8, seed) for seed in range(QUERIES)], None, fast))
    text = list(lenses([query(127, 127)], None, fast))
    dense = list(lenses([query(24, 8)], torch.ones(V, WIDTH), fast))
    whole = list(lenses([query(24, 8)], torch.ones(V, WIDTH), fast, "input"))
    wide = max(lens.nbytes for lens in dense) + (512 << 20)  # beside what many queries take
    names = ("tokens", "D", "H", "R_index", "R_value", "tail")
    tasks: dict[str, Callable[[], object]] = {
        "read": partial(read, path, names),
        "read input": partial(read, path, names[:2]),
        "input": partial(score_segment, path, places, one, "input"),
        "dense input": partial(score_segment, path, places, whole, "input", wide),
        "kernels": partial(kernels, path, one),
        "many kernels": partial(kernels, path, many),
        "thin": partial(score_segment, path, places, one),
        "exact": partial(score_segment, path, places, exact),
        "many": partial(score_segment, path, places, many, None, 4 << 30),
        "text": partial(score_segment, path, places, text),
        "dense": partial(score_segment, path, places, dense, None, wide),
        "norms": partial(norms_segment, path, places[: max(8, count // 16)]),
        "sketch": partial(Projection(SIZE, 0, (V, WIDTH)).of_segment, path, places),
    }
    seconds = by_turns(tasks, turns)
    compared = [
        ("thin ÷ read", "thin", "read", READ_AT_MOST),
        ("input ÷ read", "input", "read input", READ_AT_MOST),
        ("dense input ÷ read", "dense input", "read input", READ_AT_MOST),
        ("kernels ÷ read", "kernels", "read", None),
        ("thin ÷ kernels", "thin", "kernels", None),
        (f"{QUERIES} thin queries ÷ kernels", "many", "many kernels", None),
        ("text ÷ read", "text", "read", None),
        ("dense ÷ read", "dense", "read", None),
        (f"{QUERIES} thin queries ÷ one", "many", "thin", MANY_AT_MOST),
        ("sketch ÷ thin", "sketch", "thin", None),
        ("dense ÷ thin", "dense", "thin", None),
        ("exact ÷ thin", "exact", "thin", None),
    ]
    rows = [
        {"name": name, "value": ratio(seconds[a], seconds[b]), "at_most": bound}
        for name, a, b, bound in compared
    ]
    positions = count * LENGTH
    rows += [
        {"name": f"{name}, µs a position", "value": 1e6 * median(seconds[name]) / positions}
        for name in (
            "read",
            "input",
            "thin",
            "exact",
            "many",
            "text",
            "dense",
            "dense input",
            "sketch",
        )
    ]
    norms = 1e3 * median(seconds["norms"]) / max(8, count // 16)
    rows.append({"name": "norm, ms a record", "value": norms})
    return [{"profile": profile, **row} for row in rows]


def coarse(quick: bool, console: Console) -> list[dict[str, Any]]:
    """Search and copy of synthetic sketches in memory, a segment of 500 after another."""
    count, turns = (100_000, 3) if quick else (1_000_000, 7)
    table, rows = Table("size", "÷ copy", "ms of CPU a million", title=f"{count:,} sketches"), []
    for size in (256, 1024, 2048):
        some = (torch.randn(500, size) / size**0.5).half()
        blocks = list(some.repeat(count // 500, 1).split(500))
        sketches = Sketches(Projection(size, 0, (V, WIDTH)), blocks, torch.ones(count))
        buffer, vector = torch.empty_like(some), torch.randn(size, 1)
        tasks: dict[str, Callable[[], object]] = {
            "coarse": partial(sketches.products, vector),
            "copy": lambda blocks=blocks, buffer=buffer: [  # type: ignore[misc]
                buffer.copy_(block) for block in blocks
            ],
        }
        seconds = by_turns(tasks, turns)
        milliseconds = 1e9 / count * median(seconds["coarse"])
        value = ratio(seconds["coarse"], seconds["copy"])
        table.add_row(str(size), f"{value:.2f}", f"{milliseconds:.0f}")
        rows.append(
            {
                "name": "coarse ÷ copy", "size": size, "sketches": count, "value": value,
                "ms a million": milliseconds,
            }
        )  # fmt: skip
    console.print(table)
    return rows


def recall(data: Path, folder: Path, quick: bool, console: Console) -> list[dict[str, Any]]:
    """Whether those who score highest are among the nominated."""
    training = TrainingSettings(epochs=1, batch_size=16, learning_rate=1.5e-3)
    people = read_corpus(data / "lume/people.jsonl")
    library = read_corpus(data / "corpora/public_domain_docs.jsonl")
    met = [*people[:100], *library[:100]] if quick else [*people[:480], *library]
    start, tokenizer = load_model(data / "tiny_gpt2"), load_tokenizer(data / "tiny_gpt2")
    texts, held_out = (tokenize(of, tokenizer, LENGTH, truncate=True) for of in (met, people[480:]))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    store, keep = Store.create(folder / "store"), CaptureSettings()
    ingest(store, start, tokenizer, texts, folder / "trained", training, keep)
    checkpoint = Checkpoint(store, folder / "trained")
    some = list(texts)[:: len(texts) // 20][:20]
    asked = {
        "stored": [of_sample(store, store.run(), id) for id in some],
        "completion": [checkpoint.of_tokens(t, len(t) - 8) for t in held_out.values()],
    }
    rows = errors(store, checkpoint, list(held_out.values())[:6], console)
    columns = ("size", "sketches", "method", "query", *map(str, NOMINATED))
    table = Table(*columns, title=f"recall, {len(texts)}")
    exact = {
        (method, kind): [scores.sample_ids[:10] for scores in influences(store, some, how)]
        for method, how in METHODS.items()
        for kind, some in asked.items()
    }
    sizes = (256, 2048) if quick else (256, 1024, 2048, 4096)
    for size, often in product(sizes, (False, True)):
        sketch(store, size=size)
        search = open_search(store, store.run(), often=often)
        if often and search.reduced is None:
            continue
        for (method, kind), truth in exact.items():
            how = "reduced" if often else "whole"
            shares = []
            for count in NOMINATED:
                found = nominated(search, asked[kind], count, cosine=method == "cosine")
                hit = [len({*a} & {*b}) / len(a) for a, b in zip(truth, found, strict=True)]
                shares.append(sum(hit) / len(hit))
            table.add_row(str(size), how, method, kind, *(f"{share:.2f}" for share in shares))
            rows.append(
                {
                    "name": "recall@10", "size": size, "sketches": how, "method": method,
                    "query": kind, "records": len(texts), "nominated": NOMINATED, "value": shares,
                }
            )  # fmt: skip
    console.print(table)
    return rows


def errors(
    store: Store, checkpoint: Checkpoint, texts: Sequence[Tensor], console: Console
) -> list[dict[str, Any]]:
    """Scores in each precision, beside those of dense matrices in float64."""
    some = [checkpoint.of_tokens(text[-24:], 16) for text in texts]
    wanted = [query.gradients[None].dense().double().flatten() for query in some]
    wanted = [query / query.norm() for query in wanted]
    numbers = [n for (n,) in store.rows("SELECT DISTINCT sample_id FROM exposures ORDER BY 1")]
    numbers = numbers[:600]  # dense ones take their time
    exact = torch.empty(len(numbers), len(some), dtype=torch.float64)
    for row, number in enumerate(numbers):
        first = next(iter(store.records([number], store.run()["run_id"])))
        own = first.gradient(store.model).dense().double().flatten()
        exact[row] = torch.stack([own @ query for query in wanted]) / own.norm()
    table, rows = Table("precision", "rms error", "largest", "ten", title="cosines"), []
    for precision in ("bfloat16", "float32"):
        how = Settings("cosine", epochs="first", precision=precision)
        found = torch.empty_like(exact)
        for column, scores in enumerate(influences(store, some, how)):
            known = dict(zip(scores.sample_ids, scores.values, strict=True))
            found[:, column] = torch.tensor([known[n] for n in numbers], dtype=torch.float64)
        off = (found - exact).abs()
        both = zip(found.T.topk(10)[1].tolist(), exact.T.topk(10)[1].tolist(), strict=True)
        ten = sum(len({*a} & {*b}) for a, b in both) / len(some) / 10
        rms, most = float(off.square().mean().sqrt()), float(off.max())
        table.add_row(precision, f"{rms:.1e}", f"{most:.1e}", f"{ten:.3f}")
        rows.append({"name": "error", "precision": precision, "rms": rms, "most": most, "ten": ten})
    console.print(table)
    return rows


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return median(a / b for a, b in zip(above, below, strict=True))


def by_turns(tasks: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """CPU seconds of each task in each turn; the first warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(turns + 1):
        for name, task in tasks.items():
            begun = time.process_time()
            task()
            if turn:
                seconds[name].append(time.process_time() - begun)
    return seconds


def read(path: Path, names: Sequence[str]) -> None:
    """Copy the files' bytes out of memory maps, in blocks that fit a cache."""
    for name in names:
        [shard] = (path / name).glob("c.*")
        held = np.memmap(shard, np.uint8, "r")
        size = -(-len(held) * BLOCK // (128 * LENGTH))
        buffer = np.empty(size, np.uint8)
        for start in range(0, len(held), size):
            block = held[start : start + size]
            buffer[: len(block)] = block


def kernels(path: Path, through: Sequence[Lens]) -> None:
    """The arithmetic of a scan alone, on its first rows again and again."""
    segment = SegmentReader(path)
    count, step = segment.rows("D"), min(2048, segment.rows("D"))
    rows = [segment.tensor(name, 0, step) for name in "DH"]
    index, value = segment.tensor("R_index", 0, step), torch.rand(step, KEPT)
    for _ in range(0, count, step):
        for lens in through:
            for stored in rows:
                if lens.right is not None:
                    stored.to(lens.right.dtype) @ lens.right.T
            for table in lens.tables:
                table.index_select(0, index[:, 0])
                embedding_bag(index, table, per_sample_weights=value, mode="sum")


def segment(folder: Path, profile: str, count: int) -> tuple[Path, list[Place]]:
    likely = 1 / torch.arange(1, V + 1)
    tail, records = torch.empty(0), []
    for number in range(count):
        if number % BATCH == 0:
            tail = (likely * torch.rand(V)).bfloat16()
        records.append(record(f"s-{number}", likely, tail))
    arrays, tables = pack(records)
    run = {"run_id": 1}
    path = write_segment(
        folder, run=run, kind="gradients", profile=profile, arrays=arrays, tables=tables
    )
    columns = (tables["exposures"][name] for name in Place._fields)
    return path, [Place(*row) for row in zip(*columns, strict=True)]


def record(id: str, likely: Tensor, tail: Tensor) -> Record:
    def drawn(*shape: int) -> Tensor:
        return likely.multinomial(int(np.prod(shape)), replacement=True).view(shape)

    value = torch.rand(LENGTH, KEPT).half()
    output = OutputSide(
        H=torch.randn(LENGTH, WIDTH).bfloat16(),
        index=drawn(LENGTH, KEPT),
        value=value,
        label=-value[:, 0],
        tail_mass=value[:, 1],
        tail=tail,
    )
    exposure = Exposure(id, 1, 1, 1.0, 1.0, 1.0, 1.0, LENGTH, 1.0, 1.0, 1.0, None, 0)
    scored = torch.ones(LENGTH, dtype=torch.bool)
    return Record(
        exposure, drawn(LENGTH + 1), scored, torch.randn(LENGTH, WIDTH).bfloat16(), output
    )


def query(read: int, predicted: int, seed: int = 0) -> FactoredGradient:
    """A gradient as :func:`gradstore.influence.query.gradient_of` gives it."""
    draw = torch.Generator().manual_seed(seed)
    ids = (1 / torch.arange(1, V + 1)).multinomial(read, replacement=True, generator=draw)
    terms = [
        Term.one_hot(ids, torch.randn(read, WIDTH, generator=draw)),
        Term(
            None,
            torch.randn(predicted, V, generator=draw),
            torch.randn(predicted, WIDTH, generator=draw),
        ),
    ]
    return FactoredGradient(terms, (V, WIDTH))


if __name__ == "__main__":
    main()
