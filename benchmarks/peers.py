"""gradstore beside other libraries: what they cost on one model, and what they would foretell.

    python benchmarks/peers.py --quick                   # a minute or two: does everything run?
    python benchmarks/peers.py                           # costs, a quarter of an hour
    python benchmarks/peers.py --data ../shared/data     # the same on real text
    python benchmarks/peers.py --data ../shared/data --trained kept/80-6-0 --scores peers.npz

What is not installed is left out; `benchmarks/peers.txt` says how to install it. The last form
scores the records and queries of `benchmarks/influence.py --keep kept` by each library, at the
checkpoint trained there, for `influence.py --scores` to hold against retraining.

Costs are of GPT-2 with 4 layers of 256 (V = 50,257, tied, T = 128, B = 8), one thread, each library
in a process of its own, in CPU seconds; what is compared is measured by turns in that process.

parameters  whose gradients a library looks at: only gradstore, TRAK and captum see the embedding
bytes       on disk, of a record; and once, whatever the number of records
build       ÷ an epoch of plain training on the same records. gradstore's is such an epoch with
            capture, so that it costs 1 less on top of training; the others' are passes of their own
query       the gradient of one text of 128 tokens, then the search of all records for it: the first
            time (with opening what is stored) and, a median, again; ms. Where fewer records were
            built, ``search`` is by proportion
peak        memory of the process while building, training plainly and searching, less what it held
            before, MB

Tables go to stderr, one line of JSON to stdout.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read once, when torch is imported

import numpy as np
import torch
from beside.common import BATCH, Peer, Scores, Setting, epoch
from capture import LENGTH, VOCABULARY, WIDTH, real_batches, synthetic_batches
from influence import Plan, asked
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from gradstore.training.model import load_model

LIBRARIES = ("gradstore", "bergson", "logix", "kronfluence", "trak", "captum")
FEWER = {"kronfluence, EK-FAC": 4, "TRAK, 64 dimensions": 8, "captum, TracInCP": 16}  # records ÷
NOT_WEIGHED = ("TRAK, 2048", "EK-FAC, damped", "TrackStar", "bergson, EK-FAC")
SLOW = ("logix, rank 64",)
INSTALL = "pip install --no-deps -r benchmarks/peers.txt, whose first lines say more"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("GRADSTORE_REAL_DATA"))
    parser.add_argument("--records", type=int, default=128)
    parser.add_argument("--turns", type=int, default=2, help="of building and training")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="names, or parts of them")
    parser.add_argument("--trained", type=Path, help="a folder that influence.py --keep made")
    parser.add_argument("--scores", type=Path, help="where to write scores there, as .npz")
    parser.add_argument("--quick", action="store_true", help="16 records, one turn")
    options = parser.parse_args()
    if (options.trained is None) != (options.scores is None) or (
        options.trained and not options.data
    ):
        parser.error("--trained, --scores and --data go together")
    if options.quick:
        options.records, options.turns = 16, 1
    console = Console(stderr=True, width=max(140, Console(stderr=True).width))
    result = foretell(options, console) if options.trained else weigh(options, console)
    print(json.dumps({"benchmark": "peers", "versions": versions(), **result}))


def foretell(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Scores of each method at the checkpoint that influence.py judges by."""
    trained, queries = asked(Plan(), options.data)
    scores, took = dict[str, Scores](), dict[str, Any]()
    for name in chosen(options.only):
        if name.startswith("gradstore"):
            continue  # influence.py scores by all epochs
        found = alone(score, name, options.trained / "trained", trained, queries)
        took[name] = found.get("failed") or found["seconds"]
        console.print(name, took[name])
        if "scores" in found:
            scores[name] = found["scores"]
            np.savez(options.scores, **scores)  # type: ignore[arg-type]
    return {"scored": took}


def score(
    name: str, checkpoint: Path, records: Mapping[str, Tensor], queries: Mapping[str, Tensor]
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        begun = time.process_time()
        peer = METHODS[name](Setting(checkpoint, list(records.values()), Path(folder)))
        peer.build()
        scores = peer.search(peer.gradients(list(queries.values())))
        assert scores.shape == (len(records), len(queries))
        return {"scores": scores, "seconds": round(time.process_time() - begun, 1)}


def weigh(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """What each method costs."""
    torch.manual_seed(0)
    drawn = real_batches(options.data) if options.data else synthetic_batches()
    *records, query = chain.from_iterable(islice(drawn, options.records // BATCH + 1))
    records, rows = records[: options.records], list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=4, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        checkpoint = Path(folder) / "checkpoint"
        GPT2LMHeadModel(config).save_pretrained(checkpoint)
        tokenizer_for(checkpoint)
        names = chosen(options.only, NOT_WEIGHED + (SLOW if options.quick else ()))
        for name in names:
            some = records[: max(BATCH, len(records) // FEWER.get(name, 1))]
            share = len(records) / len(some)
            row = {"method": name}
            row |= alone(cost, name, checkpoint, some, query, share, options.turns)
            rows.append(row)
            console.print(row)
    console.print(table_of(rows))
    return {"text": str(options.data or "synthetic"), "turns": options.turns, "results": rows}


def cost(
    name: str,
    checkpoint: Path,
    records: Sequence[Tensor],
    query: Tensor,
    share: float,
    turns: int,
) -> dict[str, Any]:
    torch.set_num_threads(1)
    built, plain = list[float](), list[float]()
    some = records[: max(BATCH, len(records) // 4)]  # a quarter of an epoch will do
    for turn in range(turns):
        before = peak(again=True)
        with tempfile.TemporaryDirectory(prefix="peers-") as folder:
            peer = METHODS[name](Setting(checkpoint, records, Path(folder)))
            built.append(timed(peer.build))
            if not turn:
                result: dict[str, Any] = {"records": len(records), "build MB": peak() - before}
                of_records, once = peer.sizes()
                result |= {"bytes": round(of_records / len(records)), "once": once}
                result |= searched(peer, query, share)
        del peer
        network, before = load_model(checkpoint), peak(again=True)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        plain.append(timed(partial(epoch, network, optimizer, some)) * len(records) / len(some))
        result.setdefault("train MB", peak() - before)
    ratios = [a / b for a, b in zip(built, plain, strict=True)]
    seconds = {"plain s": median(plain), "build s": median(built)}
    return result | seconds | {"build ÷ plain": median(ratios), "ratios": ratios}


def searched(peer: Peer, query: Tensor, share: float) -> dict[str, float]:
    before, held = peak(again=True), list[Any]()
    gradient = timed(lambda: held.append(peer.gradients([query])))
    seconds = [timed(lambda: peer.search(held[0]))]
    while len(seconds) < 2 or (len(seconds) < 6 and sum(seconds) < 20):
        seconds.append(timed(lambda: peer.search(held[0])))
    first, *later = seconds
    return {
        "gradient ms": 1e3 * gradient,
        "first ms": 1e3 * first,
        "search ms": 1e3 * median(later) * share,
        "search MB": max(0.0, peak() - before),
    }


def alone(function: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """A function's result from a process of its own, or why there is none."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(quietly, function, *given).result()
        except BrokenProcessPool:
            return {"failed": "its process was killed: too little memory?"}


def quietly(function: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            return function(*given)
    except ImportError as error:
        return {"failed": f"{error.name} is not installed: {INSTALL}"}
    except Exception as error:  # a library's own trouble should not hide the others' figures
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def peak(*, again: bool = False) -> float:
    """The most memory held since it was last asked ``again``, MB (Linux)."""
    status = Path("/proc/self/status").read_text()
    most = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    if again:
        Path("/proc/self/clear_refs").write_text("5")
        most = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(most.split()[1]) / 1024


def timed(way: Callable[[], object]) -> float:
    begun = time.process_time()
    way()
    return time.process_time() - begun


def tokenizer_for(checkpoint: Path) -> None:
    """A tokenizer beside the weights, which nobody uses but bergson loads."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(checkpoint)


METHODS: dict[str, Callable[[Setting], Peer]] = {
    name: method
    for library in LIBRARIES
    for name, method in import_module(f"beside.with_{library}").METHODS.items()
}


def chosen(only: Sequence[str] | None, less: Sequence[str] = ()) -> list[str]:
    """The methods named in part, or all less some."""
    if only:
        return [name for name in METHODS if any(part in name for part in only)]
    return [name for name in METHODS if not any(part in name for part in less)]


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "bergson", "logix-ai", "kronfluence", "traker", "captum"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    shown = ("bytes", "once", "build ÷ plain", "gradient ms", "first ms", "search ms", "build MB",
             "train MB", "search MB")  # fmt: skip
    table = Table("", "records", *shown, title="costs beside each other, one thread")
    for row in rows:
        if "failed" in row:
            table.add_row(row["method"], "see above")
            continue
        cells = (f"{row[name]:,.{2 if '÷' in name else 0}f}" for name in shown)
        table.add_row(row["method"], str(row["records"]), *cells)
    return table


if __name__ == "__main__":
    main()
