"""Every byte of a store, gathered by plain means: the oracle of the tests of erasing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import zarr
from torch import Tensor

from gradstore import Store


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


def row_of(matrix: Tensor) -> bytes:
    """The first row of a matrix as it lies in memory."""
    return bytes(matrix[:1].contiguous().view(-1).untyped_storage())[
        : matrix.shape[1] * matrix.itemsize
    ]


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
