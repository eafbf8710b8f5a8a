"""The catalog: what commits, what is ignored, who may read, who must wait."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import RUN, assert_equal, record, records

from gradstore import Store
from gradstore.errors import StoreBusy, StoreDamaged, StoreMissing, StoreTooNew
from gradstore.store import catalog, database
from gradstore.store.writer import SegmentWriter

NASTY = [
    "'; DROP TABLE samples; --",
    '" OR 1=1',
    "../../x",
    "/etc/passwd",
    "naïve 🦆 ﷺ e\u0301",
    "x" * 300,
    "two\nlines\r\n\ttab",
    "null\x00byte",
    "%_*?",
    " ",
    "0",
]
Exposure = tuple[str, int]  # id, epoch


def exposures(*pairs: Exposure) -> dict[str, list[Any]]:
    """A table of exposures of ten tokens each, as it stands in a manifest."""
    count = len(pairs)
    facts = {"step": 1, "learning_rate": 0.5, "batch_share": 1.0, "grad_scale": 1.0}
    places = {"rows": 9, "tokens": 10, "scored_tokens": 9, "d_norm": 1.0}
    return {
        "id": [id for id, _ in pairs],
        "epoch": [epoch for _, epoch in pairs],
        "row_start": [9 * n for n in range(count)],
        "token_start": [10 * n for n in range(count)],
        **{name: [value] * count for name, value in (facts | places).items()},
    }


def manifest(run: int = 1, **tables: dict[str, list[Any]]) -> dict[str, Any]:
    """What read_manifest returns for a segment with these tables."""
    at = "2026-01-02T03:04:05"
    segment = {"kind": "gradients", "profile": "raw", "records": 0, "rows": 0, "bytes": 1}
    return {
        "run": {**RUN, "run_id": run, "name": f"run-{run}", "status": "running", "started_at": at},
        "segment": {**segment, "run_id": run, "digest": "00", "written_at": at},
        "tables": tables,
    }


def in_memory() -> catalog.Connection:
    connection = duckdb.connect()
    database.migrate(connection)
    return connection


def samples(connection: catalog.Connection) -> list[tuple[Any, ...]]:
    return connection.execute(
        "SELECT sample_id, id, split, tokens FROM samples ORDER BY rowid"
    ).fetchall()


def exposed(connection: catalog.Connection) -> list[tuple[Any, ...]]:
    return connection.execute(
        """SELECT run_id, id, epoch, segment_id, row_start
           FROM exposures JOIN samples USING (sample_id) ORDER BY exposures.rowid"""
    ).fetchall()


@contextmanager
def elsewhere(code: str, *arguments: object) -> Iterator[int]:
    """Another process that runs ``code`` up to its last line, and stays there; yields its pid."""
    command = [sys.executable, "-c", f"{code}; print(); input()", *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n", "it failed to start"
        yield process.pid
        process.communicate("\n")


HOLD = (
    "import sys, pathlib; from gradstore.store.catalog import lock; "
    "held = lock(pathlib.Path(sys.argv[1]), 0, ''); held.__enter__()"
)
OPEN = "import sys, duckdb; held = duckdb.connect(sys.argv[1])"


# -- schema --------------------------------------------------------------------------------------


def test_migrations_are_recorded_once(store: Store) -> None:
    scripts = sorted(p.name for p in files("gradstore.schemas").iterdir() if p.suffix == ".sql")  # type: ignore[attr-defined]
    for _ in range(2):
        with store.transaction():
            pass
        found = store.rows("SELECT number, name FROM migrations ORDER BY number")
        assert found == [(int(name[:4]), name) for name in scripts]


def test_every_table_view_and_column_has_a_comment() -> None:
    connection = in_memory()
    relations = connection.execute(
        """SELECT table_name, comment FROM duckdb_tables() WHERE table_name <> 'migrations'
           UNION ALL SELECT view_name, comment FROM duckdb_views() WHERE NOT internal"""
    ).fetchall()
    assert len(relations) > 10
    assert [name for name, comment in relations if not comment] == []
    bare = connection.execute(
        """SELECT table_name, column_name FROM duckdb_columns()
           WHERE table_name IN (SELECT table_name FROM duckdb_tables())
           AND table_name <> 'migrations' AND coalesce(comment, '') = ''"""
    ).fetchall()
    assert bare == []


def test_an_unknown_migration_means_a_newer_gradstore(store: Store) -> None:
    with store.transaction() as connection:
        connection.execute("INSERT INTO migrations VALUES (999, '0999_later.sql', now())")
    with pytest.raises(StoreTooNew, match=r"\[999\].*pip install --upgrade"), store.transaction():
        pytest.fail("a newer catalog was written to")
    with pytest.raises(StoreTooNew):
        store.recover()


# -- committing ----------------------------------------------------------------------------------


def test_a_segment_is_committed_once() -> None:
    connection = in_memory()
    for _ in range(3):
        catalog.commit_segment(
            connection, "segments/r0/000001", manifest(exposures=exposures(("a", 1), ("b", 1)))
        )
    assert connection.execute("SELECT segment_id, path FROM segments").fetchall() == [
        (1, "segments/r0/000001")
    ]
    assert exposed(connection) == [(1, "a", 1, 1, 0), (1, "b", 1, 1, 9)]
    assert connection.execute("SELECT run_id, name, sides FROM runs").fetchall() == [
        (1, "run-1", "both")
    ]


def test_samples_are_numbered_as_they_arrive() -> None:
    connection = in_memory()
    batches: list[Sequence[str]] = [["z", "a", "m"], ["a", "b"], ["m"], ["0", "z", "c"]]
    for n, ids in enumerate(batches):
        pairs = [(id, n + 1) for id in ids]
        catalog.commit_segment(connection, f"{n}", manifest(exposures=exposures(*pairs)))
    assert [(n, id) for n, id, *_ in samples(connection)] == [
        (n + 1, id) for n, id in enumerate("zamb0c")
    ]


def test_a_second_exposure_in_an_epoch_of_a_run_is_left_out() -> None:
    """A sampler that evens out its batches repeats samples, across segments and within one."""
    connection = in_memory()
    once, again = exposures(("a", 1), ("b", 1), ("a", 1)), exposures(("b", 1), ("a", 2), ("c", 1))
    catalog.commit_segment(connection, "1", manifest(exposures=once))
    catalog.commit_segment(connection, "2", manifest(exposures=again))
    catalog.commit_segment(connection, "3", manifest(run=2, exposures=once))
    assert exposed(connection) == [
        (1, "a", 1, 1, 0),
        (1, "b", 1, 1, 9),
        (1, "a", 2, 2, 9),
        (1, "c", 1, 2, 18),
        (2, "a", 1, 3, 0),
        (2, "b", 1, 3, 9),
    ]


ids = st.sampled_from(["a", "b", "c", *NASTY]) | st.text(st.characters(codec="utf-8"), max_size=9)
batches = st.lists(st.tuples(ids, st.integers(1, 2)), min_size=1, max_size=8)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 2), batches), max_size=4))
def test_commits_agree_with_a_dictionary(segments: list[tuple[int, list[Exposure]]]) -> None:
    connection = in_memory()
    numbers: dict[str, int] = {}
    first: dict[tuple[int, str, int], tuple[int, int]] = {}
    for n, (run, pairs) in enumerate(segments, start=1):
        catalog.commit_segment(connection, f"{n}", manifest(run, exposures=exposures(*pairs)))
        for at, (id, epoch) in enumerate(pairs):
            numbers.setdefault(id, len(numbers) + 1)
            first.setdefault((run, id, epoch), (n, 9 * at))
    assert samples(connection) == [(n, id, "train", 10) for id, n in numbers.items()]
    assert exposed(connection) == [(*key, *place) for key, place in first.items()]


def test_held_out_samples_and_losses() -> None:
    connection = in_memory()
    held_out: dict[str, list[Any]] = {"id": ["h", "a"], "token_start": [0, 10], "tokens": [10, 4]}
    losses: dict[str, list[Any]] = {
        "id": ["a", "h"],
        "epoch": [0, 0],
        "step": [0, 0],
        "loss": [2.5, 1.5],
    }
    catalog.commit_segment(connection, "1", manifest(exposures=exposures(("a", 1))))
    catalog.commit_segment(connection, "2", manifest(holdout=held_out))
    catalog.commit_segment(connection, "3", manifest(holdout_losses=losses))
    catalog.commit_segment(connection, "4", manifest(holdout_losses=losses))  # measured again
    assert samples(connection) == [(1, "a", "train", 10), (2, "h", "holdout", 10)]
    assert connection.execute(
        "SELECT sample_id, segment_id, token_start, tokens FROM holdout"
    ).fetchall() == [(2, 2, 0, 10), (1, 2, 10, 4)]
    assert connection.execute("SELECT sample_id, epoch, loss FROM holdout_losses").fetchall() == [
        (1, 0, 2.5),
        (2, 0, 1.5),
    ]


def test_ids_are_data_from_end_to_end(store: Store) -> None:
    writer = SegmentWriter(store, store.begin_run(RUN))
    writer.put(records(*NASTY))
    writer.close()
    found = store.resolve(NASTY)
    assert found == {id: n for n, id in enumerate(NASTY, start=1)}
    for id, number in found.items():
        [one] = store.records([number], 1)
        assert_equal(one, record(id))
    assert store.rows("SELECT id FROM gradients ORDER BY sample_id") == [(id,) for id in NASTY]


def test_a_failed_transaction_leaves_nothing(store: Store) -> None:
    run = store.begin_run(RUN)

    def commit_and_fail() -> None:
        with store.transaction() as connection:
            catalog.commit_segment(connection, "1", manifest(exposures=exposures(("a", 1))))
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        commit_and_fail()
    store.update_run(run["run_id"], status="finished", steps=3)
    assert store.rows("SELECT count(*) FROM samples") == [(0,)]
    assert store.run()["steps"] == 3


# -- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM glob('/*')",
        "COPY (SELECT 1) TO '{folder}/out.csv'",
        "COPY runs FROM '/etc/passwd'",
        "EXPORT DATABASE '{folder}/out'",
        "ATTACH '{folder}/out.duckdb'",
        "ATTACH '{catalog}' AS other",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SET lock_configuration = false",
        "INSERT INTO runs SELECT * FROM runs",
        "UPDATE runs SET status = 'x'",
        "DELETE FROM runs",
        "DROP TABLE samples",
        "CREATE TABLE t (a INT)",
    ],
)
def test_a_reader_changes_nothing_and_reads_no_files(
    store: Store, tmp_path: Path, sql: str
) -> None:
    store.begin_run(RUN)
    connection = catalog.reader(store.root)
    with pytest.raises(duckdb.Error):
        connection.execute(sql.format(folder=tmp_path, catalog=store.root / catalog.NAME))
    assert list(tmp_path.iterdir()) == [store.root]
    assert connection.execute("SELECT count(*), min(status) FROM runs").fetchall() == [
        (1, "running")
    ]


def test_an_open_reader_neither_blocks_nor_is_blocked(store: Store) -> None:
    store.begin_run(RUN)
    reading = Store.open(store.root)
    count = "SELECT count(*) FROM runs"
    assert reading.rows(count) == [(1,)]
    for n in range(2, 5):
        with store.transaction() as connection:
            assert reading.rows(count) == [(1,)]
            assert Store.open(store.root).rows(count) == [(n - 1,)]
            connection.execute("INSERT INTO runs SELECT * REPLACE (9 AS run_id) FROM runs LIMIT 1")
        assert reading.rows(count) == [(1,)], "its snapshot is unlinked by now, but still readable"
    reading.refresh()
    assert reading.rows(count) == [(4,)]


def test_another_process_reads_while_this_one_writes(store: Store) -> None:
    store.begin_run(RUN)
    code = (
        "import sys; from gradstore import Store; "
        "assert Store.open(sys.argv[1]).rows('SELECT run_id FROM runs') == [(1,)]"
    )
    with store.transaction(), elsewhere(code, store.root):
        pass


def test_two_snapshots_are_kept(store: Store) -> None:
    for n in range(1, 5):
        store.begin_run(RUN)
        kept = sorted(path.name for path in (store.root / "published").iterdir())
        names = [f"catalog-{i}.duckdb" for i in (n - 1, n) if i]
        assert kept == [name + ending for name in names for ending in ("", ".sha256")]


def test_an_empty_store_has_nothing_to_read(store: Store) -> None:
    with pytest.raises(StoreMissing, match="holds nothing yet; fill it with `gradstore ingest"):
        store.rows("SELECT 1")


def test_a_damaged_snapshot(store: Store) -> None:
    store.begin_run(RUN)
    store.refresh()
    for snapshot in (store.root / "published").iterdir():
        snapshot.write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreDamaged, match="cannot be opened by DuckDB"):
        store.rows("SELECT 1")


# -- waiting -------------------------------------------------------------------------------------


def test_a_held_catalog_lock_names_its_holder(store: Store) -> None:
    store.begin_run(RUN)
    with elsewhere(HOLD, store.root / "catalog.lock") as pid:
        with pytest.raises(StoreBusy, match=rf"pid {pid}\) is writing the catalog of {store.root}"):
            store.recover(seconds=0.1)
        assert Store.open(store.root).rows("SELECT count(*) FROM runs") == [(1,)]
    assert store.begin_run(RUN)["run_id"] == 2


def test_a_briefly_held_lock_is_waited_for(store: Store) -> None:
    with elsewhere(
        f"{HOLD}; import threading, os; threading.Timer(0.3, os._exit, [0]).start()",
        store.root / "catalog.lock",
    ):
        assert store.begin_run(RUN)["run_id"] == 1


def test_a_rank_has_one_writer(store: Store) -> None:
    run = store.begin_run(RUN)
    lock = store.root / "segments" / "r0" / "lock"
    lock.parent.mkdir()
    with elsewhere(HOLD, lock) as pid:
        with pytest.raises(StoreBusy, match=rf"pid {pid}\) is ingesting into"):
            SegmentWriter(store, run)
        SegmentWriter(store, run, rank=1).close()
    SegmentWriter(store, run).close()


def test_a_catalog_that_is_open_in_another_program(store: Store) -> None:
    store.begin_run(RUN)
    with elsewhere(OPEN, store.root / catalog.NAME):
        with pytest.raises(StoreBusy, match="open in another program; close it"):
            store.begin_run(RUN)
        assert Store.open(store.root).rows("SELECT count(*) FROM runs") == [(1,)]
    assert store.begin_run(RUN)["run_id"] == 2


def test_a_training_outlives_a_catalog_that_is_open_elsewhere(store: Store) -> None:
    into = SegmentWriter(store, store.begin_run(RUN))
    with elsewhere(OPEN, store.root / catalog.NAME):
        into.put(records("a"))
        with pytest.raises(StoreBusy, match="open in another program"):
            into.flush()
        into.put(records("b"))
    into.close()
    for id, number in store.resolve(["a", "b"]).items():
        [one] = store.records([number], 1)
        assert_equal(one, record(id))
