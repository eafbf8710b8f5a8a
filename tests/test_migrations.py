"""A catalog of any earlier schema goes forward with all of its rows, or stays as it was."""

from __future__ import annotations

import os
import shutil
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import duckdb
import pytest

from gradstore import Store
from gradstore.store import catalog, database

SCRIPTS = sorted(Path(str(files("gradstore.schemas"))).glob("*.sql"))
VALUES: dict[str, Any] = {  # one row per table: every number is 1, so that all rows join
    "BIGINT": 1,
    "BOOLEAN": True,
    "DOUBLE": 0.5,
    "FLOAT": 0.25,
    "INTEGER": 1,
    "JSON": '{"notes": []}',
    "TIMESTAMP": datetime(2026, 1, 2, 3, 4, 5),
    "UBIGINT": catalog.hash_of("text"),
    "VARCHAR": "text",
    "VARCHAR[]": ["text"],
}
SAID = {"role": "forget", "metric": "loss", "split": "train"}  # which views ask for
EARLIER = range(1, len(SCRIPTS) + 1)
Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def store_of(root: Path, scripts: list[Path]) -> Store:
    """A store whose catalog has had these scripts, and a row in each table."""
    store = Store.create(root)
    with database.writable(root / catalog.NAME) as connection:
        connection.execute(
            "CREATE TABLE migrations (number INTEGER, name VARCHAR, applied_at TIMESTAMP)"
        )
        for script in scripts:
            connection.execute(script.read_text())
            row = [int(script.name[:4]), script.name, VALUES["TIMESTAMP"]]
            connection.execute("INSERT INTO migrations VALUES (?, ?, ?)", row)
        for table in names(connection, "table"):
            columns = connection.execute(f"DESCRIBE {table}").fetchall()
            row = [SAID.get(name, VALUES[kind]) for name, kind, *_ in columns]
            marks = ", ".join("?" * len(row))
            connection.execute(f"INSERT INTO {table} VALUES ({marks})", row)
    catalog.publish(root)
    return store


def names(connection: catalog.Connection, kind: str) -> list[str]:
    """The catalog's tables but for ``migrations``, or its views."""
    found = connection.execute(
        f"""SELECT {kind}_name FROM duckdb_{kind}s()
            WHERE NOT internal AND {kind}_name <> 'migrations' ORDER BY ALL"""
    )
    return [name for (name,) in found.fetchall()]


def rows_of(store: Store, kind: str) -> Rows:
    with catalog.reader(store.root) as connection:
        found = names(connection, kind)
    return {name: store.table(f"FROM {name}") for name in found}


def within(before: Rows, after: Rows) -> bool:
    """Whether all rows of all tables are there still, in columns that may have become more."""
    return all(
        [{column: row[column] for column in had[0]} for row in after[table]] == had
        for table, had in before.items()
    )


@pytest.mark.parametrize("count", EARLIER)
def test_a_catalog_goes_forward_with_all_its_rows(tmp_path: Path, count: int) -> None:
    store_of(tmp_path / "store", SCRIPTS[:count])
    store = Store.open(tmp_path / "store")
    before = rows_of(store, "table")
    assert len(before) >= 10
    assert {len(rows) for rows in before.values()} == {1}
    assert {len(rows) for rows in rows_of(store, "view").values()} <= {0, 1}
    with store.transaction():
        pass
    after = rows_of(Store.open(store.root), "table")
    assert within(before, after)
    assert {len(after[table]) for table in after.keys() - before.keys()} <= {0}
    views = rows_of(store, "view")
    assert views.keys() >= {"gradients", "forgotten", "collateral", "ledger", "duplicates"}
    assert len(views["gradients"]) == len(views["forgotten"]) == len(views["collateral"]) == 1
    found = store.rows("SELECT number, name FROM migrations ORDER BY number")
    assert found == [(int(script.name[:4]), script.name) for script in SCRIPTS]


def test_evaluations_of_an_earlier_schema_have_no_intervals(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", SCRIPTS[:11])
    [before] = store.table("FROM evidence")
    with store.transaction():
        pass
    [after] = store.table("FROM evidence")
    ends = [
        f"{name}_{end}" for name in ("original", "model", "reference") for end in ("low", "high")
    ]
    assert after == before | dict.fromkeys(["samples", *ends])
    assert before["model"] is not None


@pytest.mark.parametrize("count", [1, len(SCRIPTS)])
def test_a_failing_script_leaves_the_catalog_as_it_was(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tmp_path / "store", SCRIPTS[:count])
    schemas = tmp_path / "schemas"
    schemas.mkdir()
    for script in SCRIPTS[:count]:
        shutil.copy(script, schemas)
    bad = "CREATE TABLE half (id INTEGER); DELETE FROM samples; INSERT INTO half SELECT nowhere;"
    (schemas / f"{count + 1:04d}_bad.sql").write_text(bad)
    before = rows_of(store, "table")
    store.refresh()
    monkeypatch.setattr(database, "files", lambda _: schemas)
    with pytest.raises(duckdb.Error, match="nowhere"), store.transaction():
        pytest.fail("it went on")
    monkeypatch.undo()
    store.recover()  # publishes the catalog
    after = rows_of(store, "table")
    assert within(before, after)
    assert "half" not in after
