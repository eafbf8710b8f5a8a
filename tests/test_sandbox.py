"""``gradstore sql`` in the hands of a stranger: no file, no write, no end of memory or time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import pytest
from tiny import Tiny, refused, run, run_json

from gradstore import Store
from gradstore.errors import QueryError
from gradstore.store import catalog

pytest_plugins = ["tiny"]
HEAVY = {"torch", "zarr", "transformers", "blosc", "numcodecs", "pyarrow", "numpy", "safetensors"}


@pytest.mark.parametrize(
    "query",
    [
        "SELECT size FROM read_blob('{own}')",
        "SELECT content FROM read_text('{own}')",
        "SELECT * FROM glob('{own}*')",
        "SELECT * FROM '{own}'",
        "ATTACH '{own}' AS again (READ_ONLY)",
        "COPY samples TO '{own}.tmp/x.csv'",
        "COPY samples TO '.tmp/x.csv'",
        "COPY samples TO '{folder}/x.parquet'",
        "COPY samples TO '/dev/stdout'",
        "SELECT size FROM read_blob('file://{own}')",
        "SET disabled_filesystems = ''",
        "RESET temp_directory",
        "LOAD httpfs",
        "SELECT * FROM read_csv('https://127.0.0.1:1/x.csv')",
    ],
)
def test_not_even_the_catalogs_own_file_is_opened(query: str, copied: Tiny) -> None:
    snapshots = copied.store / "published"
    own = catalog.snapshots_of(copied.store)[-1][1]
    before = sorted(copied.store.rglob("*"))
    store = Store.open(copied.store)
    for _ in range(2):  # the second shares DuckDB's instance with the first
        with pytest.raises(QueryError, match="disabled .* configuration|configuration has been l"):
            store.query(query.format(own=own, folder=snapshots))
    assert sorted(copied.store.rglob("*")) == before
    assert store.query("SELECT count(*) FROM samples")[1] == [(32,)]
    assert store.query("SELECT current_setting('temp_directory')")[1] == [("",)]


def test_reading_only_and_no_external_access_are_not_enough(copied: Tiny) -> None:
    """DuckDB lets a statement read the file it has open, and write where it would spill."""
    own = catalog.snapshots_of(copied.store)[-1][1]
    Path(f"{own}.tmp").mkdir()
    guards: dict[str, Any] = {"enable_external_access": "false", "lock_configuration": "true"}
    with duckdb.connect(own, read_only=True, config=guards) as connection:
        read = connection.execute("SELECT size FROM read_blob(?)", [str(own)]).fetchall()
        assert read == [(own.stat().st_size,)]
        connection.execute(f"COPY samples TO '{own}.tmp/x.csv'")
    assert Path(f"{own}.tmp/x.csv").exists()


def test_a_deleted_row_cannot_be_read(copied: Tiny) -> None:
    secret = "zz-deleted-person"
    with Store.open(copied.store) as store:
        with store.transaction() as connection:
            connection.execute("INSERT INTO samples SELECT * REPLACE (99 AS sample_id, ? AS id) "
                               "FROM samples LIMIT 1", [secret])  # fmt: skip
        with store.transaction() as connection:
            connection.execute("DELETE FROM samples WHERE id = ?", [secret])
        own = catalog.snapshots_of(copied.store)[-1][1]
        assert store.query("SELECT count(*) FROM samples")[1] == [(32,)]
        with pytest.raises(QueryError, match="disabled by configuration"):
            store.query(f"SELECT content FROM read_blob('{own}')")
        text = str(store.query("SELECT * FROM samples")) + str(store.query("SUMMARIZE samples"))
        assert secret not in text


@pytest.mark.parametrize(
    ("query", "options"),
    [
        ("SELECT length(repeat('x', 4000000000))", ()),
        ("SELECT list(i) FROM range(1000000000) t(i)", ()),
        ("SELECT * FROM range(100000000)", ()),  # rows in Python
        ("SELECT * FROM neighbours('p-01')", ("--memory-limit", "100MB")),
    ],
)
def test_memory_has_a_limit(query: str, options: tuple[object, ...], trained: Tiny) -> None:
    limit = options or ("--memory-limit", "300MB")
    said = refused("sql", query, "-s", trained.store, *limit)
    size = str(limit[1]).removesuffix("MB")
    assert said == (
        f"the statement needed more than {size} MB of memory; raise --memory-limit or ask for less"
    )


def test_time_has_a_limit(trained: Tiny) -> None:
    endless = "SELECT count(*) FROM range(100000000) a, range(100000000) b"
    said = refused("sql", endless, "-s", trained.store, "--timeout", 0.5)
    assert said == "the statement was stopped after 0.5 seconds; raise --timeout or ask for less"
    for no_time in (0, "inf", "nan", 1e10):
        run("sql", "SELECT 1", "-s", trained.store, "--timeout", no_time, code=2)


def test_columns_of_one_name_are_all_shown(trained: Tiny) -> None:
    query = "SELECT 'a' x, 'b' x, 'c' x_1, 'd' x, 'e' x_1"
    [row] = run_json("sql", query, "-s", trained.store)
    assert row == {"x": "a", "x_2": "b", "x_1": "c", "x_3": "d", "x_1_1": "e"}


def test_printing_counts_work_and_not_waiting(trained: Tiny) -> None:
    """A pager that is slow does not end it, and rows without end do not print for ever."""
    query = "SELECT i, repeat('x', 99) FROM range(9000) t(i)"
    command = [sys.executable, "-m", "gradstore", "sql", query, "--csv", "-s", str(trained.store)]
    reading = ["--timeout", "2"]
    with subprocess.Popen([*command, *reading], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        assert len(process.stdout.readlines()) == 9000
    assert process.returncode == 0
    many = "SELECT i, md5(i::VARCHAR) FROM range(200000) t(i)"
    said = refused("sql", many, "--table", "-s", trained.store, "--timeout", 1)
    assert "stopped after 1 seconds" in said


def test_a_reader_that_has_enough_is_no_error(trained: Tiny) -> None:
    query = "SELECT i, repeat('x', 99) FROM range(9000) t(i)"
    command = [sys.executable, "-m", "gradstore", "sql", query, "--csv", "-s", str(trained.store)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_functions_over_gradients_work_within_the_default_limits(trained: Tiny) -> None:
    query = "SELECT * FROM neighbours('p-01', 3)"
    rows = [tuple(row.values()) for row in run_json("sql", query, "-s", trained.store)]
    assert rows == [(id, pytest.approx(c)) for id, c in Store.open(trained.store).query(query)[1]]


def test_its_process_needs_neither_torch_nor_click(trained: Tiny) -> None:
    program = (
        "import sys, json, os, importlib; "
        "os._exit = lambda code: print(json.dumps(sorted(sys.modules))); "
        "importlib.import_module('gradstore.cli.sandbox').main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, str(trained.store), "csv", "60", str(1 << 30)]
    done = subprocess.run(
        command, input="SELECT count(*) AS n FROM samples", capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    name, count, modules = done.stdout.splitlines()
    found = {module.split(".")[0] for module in json.loads(modules)}
    assert (name, count) == ("n", "32")
    assert not found & (HEAVY | {"click", "rich"})
    assert "duckdb" in found


def test_the_writer_still_reaches_its_file(copied: Tiny) -> None:
    with Store.open(copied.store) as store:
        with catalog.reader(store.root), store.transaction() as connection:
            connection.execute("UPDATE runs SET name = 'renamed'")
        assert store.rows("SELECT name FROM runs") == [("renamed",)]
