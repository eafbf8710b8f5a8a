"""Stores to erase from, and every byte of a store by plain means: what tests of erasing share.

PYTEST_DONT_REWRITE: test modules import helpers from here, and name it as their plugin too.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import torch
import zarr
from records import RUN, records, tail
from torch import Tensor

from gradstore import Store
from gradstore.store import catalog
from gradstore.store.catalog import Columns
from gradstore.store.record import Record
from gradstore.store.writer import SegmentWriter
from gradstore.upkeep.verify import verify

IDS = ("gone-1", "stays-1", "stays-2", "gone-2", "stays-3")
HELD = {"held-gone": torch.arange(100, 120), "held-stays": torch.arange(300, 330)}
GOING = ("gone-1", "gone-2", "held-gone")


def fill(store: Store) -> dict[str, Record]:
    """Segments of gradients in two epochs, held-out tokens and losses, an order; the records."""
    store.begin_run({**RUN, "name": "one"})
    into = SegmentWriter(store, store.run())
    made: dict[str, Record] = {}
    shares = [tail("first"), tail("second")]
    for epoch in (1, 2):
        for ids, shared in ((IDS[:3], shares[0]), (IDS[3:], shares[1]), (("gone-1",), None)):
            if epoch == 2 or shared is not None:  # a segment in which nothing stays
                number = epoch if shared is not None else 3
                batch = records(*ids, epoch=number, tail=shared)
                into.put(batch)
                into.flush()
                made |= {f"{one.exposure.id} {number}": one for one in batch}
    table: Columns = {"id": list(HELD), "token_start": [0, 20], "tokens": [20, 30]}
    into.put_state("holdout", {"tokens": torch.cat(list(HELD.values())).int()}, {"holdout": table})
    losses: Columns = {"id": list(HELD), "epoch": [0, 0], "step": [0, 0], "loss": [1.5, 2.5]}
    into.put_state("holdout", {}, {"holdout_losses": losses})
    keys = np.array([catalog.hash_of(id) for id in IDS], np.uint64).view(np.int64)
    into.put_state("order", {"order": torch.from_numpy(keys)}, {})
    into.put_state("moments", {"embedding": torch.rand(4, 3)}, {})
    into.close()
    return made


Filled = tuple[Store, dict[str, Record]]


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Filled]:
    folder, made = tmp_path_factory.mktemp("erase"), {}
    for profile in ("packed", "raw"):
        store = Store.create(folder / profile, profile=profile)
        made[profile] = store, fill(store)
        store.refresh()
    return made


@pytest.fixture(params=["packed", "raw"])
def filled(request: pytest.FixtureRequest, templates: dict[str, Filled], tmp_path: Path) -> Filled:
    template, made = templates[request.param]
    return Store.open(shutil.copytree(template.root, tmp_path / "store")), made


packed = pytest.mark.parametrize("filled", ["packed"], indirect=True)


def patterns(made: dict[str, Record]) -> dict[str, bytes]:
    """What must be gone, as it lies in files or arrays."""
    found = {id: id.encode() for id in GOING}
    for name, one in made.items():
        if name.split()[0] in GOING:
            found[f"D of {name}"] = row_of(one.D)
            found[f"tokens of {name}"] = one.tokens.to(torch.uint16).numpy().tobytes()
            if one.output is not None:
                found[f"H of {name}"] = row_of(one.output.H, -1)
    for id in IDS:
        if id in GOING:
            found[f"hash of {id}"] = catalog.hash_of(id).to_bytes(8, "little")
    found["held"] = HELD["held-gone"].int().numpy().tobytes()
    return found


def assert_gone(store: Store, made: dict[str, Record]) -> None:
    held = contents(store.root)
    for name, pattern in patterns(made).items():
        assert [place for place, data in held.items() if pattern in data] == [], name


def contents(root: Path) -> dict[str, bytes]:
    """Files as they lie, arrays as zarr-python decodes them, catalogs as DuckDB prints them."""
    found = {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for metadata in root.glob("segments/*/*/*/zarr.json"):
        array = zarr.open_array(str(metadata.parent), mode="r")
        found[f"{metadata.parent}, decoded"] = np.asarray(array[:]).tobytes()
    for file in root.rglob("*.duckdb"):
        with duckdb.connect() as connection:  # a file that this process has open elsewhere
            connection.execute(f"ATTACH '{file}' AS c (READ_ONLY); USE c")
            for (table,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall():
                rows = connection.execute(f"FROM {table}").fetchall()
                found[f"{file} {table}"] = repr(rows).encode()
    return found


def where(root: Path, pattern: bytes) -> set[str]:
    """The places below ``root`` that hold a pattern."""
    return {place for place, data in contents(root).items() if pattern in data}


def row_of(matrix: Tensor, number: int = 0) -> bytes:
    """A row of a matrix as it lies in memory."""
    return matrix[number].contiguous().view(torch.uint8).numpy().tobytes()


def state(store: Store, *without: str) -> dict[str, Any]:
    """All that a store has of its other samples: records, tokens, and rows by their ids."""
    store.refresh()
    samples = dict(store.rows("SELECT id, sample_id FROM samples ORDER BY ALL"))
    kept = {id: number for id, number in samples.items() if id not in without}
    runs = [run for (run,) in store.rows("SELECT run_id FROM runs ORDER BY ALL")]
    tables = ("exposures", "holdout", "holdout_losses", "scores", "token_losses", "matches")
    places = {"segment_id", "row_start", "token_start", "tail_row"}  # these may change
    return {
        "records": [r for run in runs for r in store.records(list(kept.values()), run)],
        "tokens": {
            (run, number): tokens.tolist()
            for run in runs
            for number, tokens in store.tokens(list(kept.values()), run).items()
        },
        **{
            table: sorted(
                str({name: value for name, value in row.items() if name not in places})
                for row in store.table(f"FROM {table}")
                if {row["sample_id"], row.get("of_sample_id", row["sample_id"])} <= {*kept.values()}
            )
            for table in tables
        },
    }


def sound(root: Path) -> bool:
    return not any(finding.damage for finding in verify(root))


def rebuilt(root: Path) -> Store:
    """The store with a catalog made of nothing but its segments."""
    (root / catalog.NAME).unlink()
    shutil.rmtree(root / "published")
    (root / "published").mkdir()
    return Store.open(root)
