"""What erasing one record costs in a store of many: seconds, and what they are spent on.

The store is made for it: segments of 64 MB written through the store's own writer, and rows of
samples and exposures beside them, as a long training would have left. Talks on stderr; the last
line, on stdout, is JSON. The measure is the same disk at the same time: one segment copied and
synced, and the catalog copied and synced.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

from gradstore import Store
from gradstore.store import catalog
from gradstore.store.files import sync_folder, sync_tree
from gradstore.store.record import Exposure, OutputSide, Record
from gradstore.store.writer import SegmentWriter
from gradstore.upkeep.erase import erase
from gradstore.upkeep.search import search, traces

VOCABULARY, WIDTH, TOKENS, KEPT = 50_257, 768, 128, 64


def fill(store: Store, segments: int, rows: int) -> None:
    """Write segments, then rows of the catalog for ``rows`` records of which nothing is kept."""
    store.begin_run({"epochs_captured": "first", "sides": "both", "top_k": KEPT})
    into, number = SegmentWriter(store, store.run()), 0
    while store.rows("SELECT count(*) FROM segments")[0][0] < segments:
        tail = torch.rand(VOCABULARY).softmax(0).bfloat16()
        into.put([record(f"r-{number + i:07d}", tail) for i in range(8)])
        number += 8
        store.refresh()
    into.close()
    with store.transaction() as connection:
        connection.execute(
            """INSERT INTO samples
               SELECT range + 1000000, 'r-' || lpad((range + 1000000)::VARCHAR, 9, '0'),
                      hash(range), 'train', 128, now()::TIMESTAMP FROM range(?)""",
            [rows],
        )
        connection.execute(
            """INSERT INTO exposures BY NAME
               SELECT e.* REPLACE (range + 1000000 AS sample_id, 0 AS segment_id)
               FROM (SELECT * FROM exposures LIMIT 1) e, range(?)""",
            [rows],
        )


def record(id: str, tail: torch.Tensor) -> Record:
    """A record of GPT-2 small's shape, of random numbers."""
    t = TOKENS - 1
    exposure = Exposure(id, 1, 1, 1e-4, 1.0, 1.0, 3.0, t, 1.0, 1.0, 0.9, None, 0)
    R = torch.rand(t, KEPT).half()
    output = OutputSide(
        torch.randn(t, WIDTH).bfloat16(),
        torch.randint(VOCABULARY, (t, KEPT)),
        R,
        -R[:, 0],
        R[:, 1],
        tail,
    )
    tokens = torch.randint(VOCABULARY, (TOKENS,))
    return Record(exposure, tokens, torch.ones(t).bool(), torch.randn(t, WIDTH).bfloat16(), output)


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def copy(source: Path, target: Path) -> None:
    """Copy a file or folder and sync it: what moving those bytes costs at the least."""
    if source.is_file():
        shutil.copyfile(source, target)
        sync_folder(target)
        return
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        if path.is_file():
            sync_folder(path)
    sync_tree(target)


@click.command()
@click.option("--quick", is_flag=True, help="Four segments instead of sixteen.")
@click.option("--segments", type=int, help="How many of 64 MB; 150 are 10 GB in memory.")
@click.option("--rows", default=1_000_000, show_default=True, help="Rows of the catalog.")
@click.option("--folder", type=click.Path(path_type=Path), help="Disk to measure on.")
def main(quick: bool, segments: int | None, rows: int, folder: Path | None) -> None:
    """Erase one record, and print seconds."""
    torch.manual_seed(0)
    segments = segments or (4 if quick else 16)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        root = Path(scratch) / "store"
        store = Store.create(root)
        print(f"filling {segments} segments and {rows} rows", file=sys.stderr)
        fill(store, segments, rows)
        id, moments = "r-0000005", [(time.perf_counter(), "")]
        marks = traces(store, store.resolve([id]))
        segment = root / "segments" / "r0" / "000001"
        floor = timed(lambda: copy(segment, Path(scratch) / "segment"))
        floor += timed(lambda: copy(root / catalog.NAME, Path(scratch) / "catalog"))

        def said(what: str) -> None:
            moments.append((time.perf_counter(), what))
            print(f"{moments[-1][0] - moments[0][0]:6.2f} s {what}", file=sys.stderr)

        moments[0] = time.perf_counter(), ""
        cpu = time.process_time()
        done = erase(store, [id], progress=said)
        whole = time.perf_counter() - moments[0][0]
        cpu = time.process_time() - cpu
        assert done.search is not None
        searching = whole - (moments[-1][0] - moments[0][0])
        found = timed(lambda: search(store, [id], marks))
        figures = {
            "rows": rows,
            "segments": segments,
            "store_bytes": sum(p.stat().st_size for p in root.rglob("*") if p.is_file()),
            "catalog_bytes": os.path.getsize(root / catalog.NAME),
            "seconds": round(whole, 2),
            "cpu_seconds": round(cpu, 2),
            "seconds_of_search": round(searching, 2),
            "search_again": round(found, 2),
            "searched_bytes": done.search.bytes,
            "hits": len(done.search.hits),
            "copies_of_segment_and_catalog": round((whole - searching) / floor, 2),
            "floor_seconds": round(floor, 2),
        }
        store.refresh()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
