"""Makes ``data/store-<number>.tar.xz``, a small store in which much was done, and what it holds.

``python tests/make_store.py 4 [--encrypt]``: run once for a release that changes how a store lies
on disk; what is committed is never made again. 2 is encrypted, under a key that everybody knows; 3
is the first of arrays in one folder, XXH3 and keyed erasures.
An archive, because DuckDB's files are megabytes of zeros, and Git keeps neither times nor modes.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import tiny
from encrypted import KEY

from gradstore import Store
from gradstore.store import audit
from gradstore.store.record import Record

DATA = Path(__file__).with_name("data")
CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, "n_positions": 32}
SMALL = ("--vocabulary", 300, "--top-k", 2)
TABLES = ("samples", "exposures", "matches", "requests", "scores", "influences", "erasures")


def facts(record: Record) -> dict[str, Any]:
    """A record's figures as they are, and the digest of its arrays."""
    exposure, arrays = record.exposure, [record.tokens, record.scored, record.D]
    if (side := record.output) is not None:
        arrays += [side.H, side.index, side.value, side.label, side.tail_mass, side.tail]
    digest = sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {list(array.shape)} {array.tolist()}\n".encode())
    return {
        "id": exposure.id,
        "epoch": exposure.epoch,
        "step": exposure.step,
        "loss": exposure.loss,
        "d_norm": exposure.d_norm,
        "tokens": record.tokens.tolist(),
        "arrays": digest.hexdigest(),
    }


def contents(store: Store) -> dict[str, Any]:
    """What a store holds, as JSON."""
    ids = store.rows("SELECT id, split, sample_id FROM samples ORDER BY sample_id")
    numbers = [number for *_, number in ids]
    held = [number for _, split, number in ids if split == "holdout"]
    return {
        "samples": [[id, split] for id, split, _ in ids],
        "records": [facts(record) for record in store.records(numbers, 1)],
        "held out": {str(n): tokens.tolist() for n, tokens in store.tokens(held, 1).items()},
        "rows": {table: store.rows(f"SELECT count(*) FROM {table}")[0][0] for table in TABLES},
        "verdicts": [verdict for (verdict,) in store.rows("SELECT verdict FROM requests")],
        "audit": [[row["kind"], row["digest"]] for row in store.table(audit.SELECT)],
    }


def make(folder: Path, *options: str) -> Path:
    """A tiny ingest of two epochs; a record forgotten with a receipt, another erased."""
    tiny.CONFIG.clear()
    tiny.CONFIG.update(CONFIG)
    files = tiny.files(folder)
    for path, count in ((files.data, 5), (files.holdout, 2)):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    store = ("-s", files.store)
    tiny.run("init", files.store, *options)
    tiny.run(
        "ingest", files.data, *store, "--config", files.config, *tiny.FRESH, *SMALL,
        "--holdout", files.holdout, "--out", files.model,
    )  # fmt: skip
    model, out = ("--model", files.model), ("--out", folder / "out")
    tiny.run("match", "p-02", *store, "--jaccard", 0.01)
    tiny.run("top", "--id", "p-03", *store)
    tiny.run("sketch", *store)
    tiny.run("forget", "p-02", *tiny.FAR, *store, *model, *out, code=None)
    tiny.run("erase", "p-05", "h-02", *store, "--yes")
    return files.store


def main() -> None:
    number, *options = sys.argv[1:]
    os.environ["GRADSTORE_KEY"] = KEY.hex()
    with tempfile.TemporaryDirectory() as folder:
        root = make(Path(folder), *options)
        with Store.open(root) as store:
            said = contents(store)
        name = DATA / f"store-{number}"
        name.with_suffix(".json").write_text(json.dumps(said, indent=1) + "\n")
        with tarfile.open(name.with_suffix(".tar.xz"), "w:xz", preset=9) as archive:
            archive.add(root, "store")
        print(json.dumps({path.name: path.stat().st_size for path in DATA.glob(f"{name.name}.*")}))


if __name__ == "__main__":
    main()
