"""The DuckDB catalog: one transaction makes a segment visible, a published copy lets all read.

DuckDB lets no reader in while a writer has the file open. So the catalog itself is opened only to
commit, briefly and under a lock, and readers open the newest copy in ``published/``.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from gradstore.errors import (
    IdError,
    QueryError,
    StoreBusy,
    StoreDamaged,
    StoreMissing,
)
from gradstore.store.database import Connection as Connection
from gradstore.store.database import io_errors, migrate, new, remove, snapshot, writable
from gradstore.store.files import (
    SEAL,
    blocks,
    make_file,
    replace_durably,
    seal,
    sync_folder,
    unlinked,
    write_durably,
    writing,
)
from gradstore.store.manifest import MANIFEST

if TYPE_CHECKING:
    import pyarrow

NAME = "catalog.duckdb"
ERASING = "erasing"  # a file that is there while an erasure is under way
REPLACED = "SELECT DISTINCT unnest(replaces) FROM segments"
LOCK_SECONDS = 10.0
_KEEP_SNAPSHOTS = 2
_MISFITS = (  # what inserting wrong names, types or numbers can end in
    duckdb.DataError, duckdb.IntegrityError, duckdb.NotSupportedError, duckdb.ProgrammingError,
    ArithmeticError, LookupError, TypeError, ValueError,
)  # fmt: skip

Columns = Mapping[str, Sequence[Any]]


@contextmanager
def lock(path: Path, seconds: float, doing: str) -> Iterator[None]:
    """Hold an exclusive advisory lock; it is let go when the process ends, however it ends."""
    make_file(unlinked(path, path.parent))
    with open(path, "r+") as file:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                    raise StoreBusy(
                        f"another process (pid {holder}) is {doing} {path.parent}; "
                        "wait for it to finish, then run the same command again"
                    ) from None
                time.sleep(0.02)
        try:
            with writing(path):
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
            yield
        finally:  # closing is not enough: a forked child shares the descriptor
            fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def transaction(root: Path, seconds: float = LOCK_SECONDS) -> Iterator[Connection]:
    """Open the catalog, migrate it, run one transaction, and publish a snapshot of the result."""
    with lock(root / "catalog.lock", seconds, "writing the catalog of"):
        if not unlinked(root / NAME, root).exists():
            _create(root)
        with writable(root / NAME) as connection:
            migrate(connection)
            connection.execute("BEGIN")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
        publish(root)


def publish(root: Path) -> None:
    """Copy the checkpointed catalog to where readers look for it; needs the catalog's lock."""
    snapshots = snapshots_of(root)
    number = snapshots[-1][0] + 1 if snapshots else 1
    folder = unlinked(root / "published", root)
    temporary, final = folder / f".tmp-{number}", folder / f"catalog-{number}.duckdb"
    with writing(temporary):
        temporary.unlink(missing_ok=True)
        _, digest = write_durably(temporary, blocks(root / NAME))
    seal(final, digest)
    replace_durably(temporary, final)
    for _, old in snapshots[: -_KEEP_SNAPSHOTS + 1 or None]:
        old.unlink(missing_ok=True)
        old.with_name(old.name + SEAL).unlink(missing_ok=True)
    sync_folder(folder)


def renew(root: Path) -> None:
    """Copy the catalog to a new file, and publish that alone: no other holds what was deleted.

    DuckDB leaves deleted text in its file, whatever is checkpointed, vacuumed or written later.
    """
    fresh = root / f".tmp-{NAME}"
    with lock(root / "catalog.lock", LOCK_SECONDS, "writing the catalog of"):
        remove(root.glob(f"{fresh.name}*"))
        with writable(root / NAME):
            pass  # takes in what a crash left in the log
        with io_errors(fresh), duckdb.connect() as connection:
            for path, name, how in ((root / NAME, "old", "(READ_ONLY)"), (fresh, "fresh", "")):
                quoted = str(path).replace("'", "''")
                connection.execute(f"ATTACH '{quoted}' AS {name} {how}")
            connection.execute("COPY FROM DATABASE old TO fresh")
            connection.execute("CHECKPOINT fresh")
        fresh.chmod(0o600)
        sync_folder(fresh)  # works on files too
        replace_durably(fresh, root / NAME)
        publish(root)
        old = [path for _, path in snapshots_of(root)[:-1]]
        remove([*old, *(path.with_name(path.name + SEAL) for path in old)])
        remove((root / "published").glob(".tmp-*"))
        sync_folder(root / "published")


def reader(root: Path) -> Connection:
    """A read-only connection to the newest snapshot, with no access to files or settings.

    Not even to its own: the file is open already, and DuckDB opens no other (without external
    access alone, ``read_blob`` still reads the catalog's bytes, rows that were deleted among them,
    and ``COPY`` writes to the temporary directory).
    """
    for _ in range(10):  # a snapshot may be replaced between listing and opening
        snapshots = snapshots_of(root)
        if not snapshots:
            break
        try:
            return snapshot(unlinked(snapshots[-1][1], root))
        except StoreMissing:
            continue
    raise StoreMissing(
        f"the store at {root} holds nothing yet; fill it with `gradstore ingest --store {root} ...`"
    )


def query(connection: Connection, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Run a user's SQL: column names and rows. Raises :class:`QueryError` where DuckDB refuses."""
    try:
        cursor = connection.execute(sql)
        if cursor is None:
            raise QueryError("there is no statement in this SQL; try `SELECT * FROM gradients`")
        names = [column[0] for column in cursor.description or ()]
        return names, cursor.fetchall() if names else []
    except duckdb.Error as error:
        said = str(error).strip().split("\n")[0]
        raise QueryError(f"{said} (`gradstore schema` lists tables and columns)") from error


def is_published(root: Path) -> bool:
    """Whether the newest snapshot shows everything the catalog holds (by file times)."""
    catalog, snapshots = root / NAME, snapshots_of(root)
    if not catalog.exists():
        return not snapshots
    if (root / f"{NAME}.wal").exists() or not snapshots:
        return False
    return snapshots[-1][1].stat().st_mtime_ns >= catalog.stat().st_mtime_ns


def insert(connection: Connection, table: str, columns: Columns) -> None:
    """Append rows, given by column name; columns left out are NULL."""
    import pyarrow

    rows: pyarrow.Table = pyarrow.table({name: list(column) for name, column in columns.items()})
    connection.register("arriving", rows)
    connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM arriving")
    connection.unregister("arriving")


def commit_segment(connection: Connection, path: str, manifest: Mapping[str, Any]) -> None:
    """Insert a segment's manifest; does nothing if the catalog has the segment already.

    Those that it replaces are taken out. Samples get their numbers here. A second exposure of one
    sample in one epoch of one run (a distributed sampler repeats samples to even out its batches)
    is left out. Raises :class:`StoreDamaged` if what the manifest says are no rows of these tables.
    """
    try:
        _commit_segment(connection, path, manifest)
    except _MISFITS as error:
        said = str(error).strip().split("\n")[0]
        raise StoreDamaged(
            f"{path}/{MANIFEST} does not fit the catalog ({said}); set the segment aside with "
            "`gradstore verify --repair`, or restore it from a backup"
        ) from error


def _commit_segment(connection: Connection, path: str, manifest: Mapping[str, Any]) -> None:
    known = connection.execute("SELECT 1 FROM segments WHERE path = ?", [path]).fetchall()
    if known:
        return
    tables, run = manifest["tables"], manifest["run"]
    if not connection.execute("SELECT 1 FROM runs WHERE run_id = ?", [run["run_id"]]).fetchall():
        insert(connection, "runs", {name: [value] for name, value in run.items()})
    replaces = manifest["segment"].get("replaces", [])
    segment_id = _number(connection, replaces)
    _retire(connection, replaces)
    segment = dict(manifest["segment"], segment_id=segment_id, path=path)
    insert(connection, "segments", {name: [value] for name, value in segment.items()})
    for split, table in (("train", "exposures"), ("holdout", "holdout")):
        if table in tables:
            _add_samples(connection, tables[table], split, manifest["segment"]["written_at"])
    for table, columns in tables.items():
        _insert_by_id(connection, table, columns, run["run_id"], segment_id)


def check_there(connection: Connection, sample_ids: Sequence[int], ids: Sequence[str] = ()) -> None:
    """Raise :class:`IdError` if one of these samples was erased since its figures were read."""
    [(numbers, names)] = connection.execute(
        """SELECT (SELECT count(*) FROM (SELECT DISTINCT unnest(?::BIGINT[]) AS sample_id)
                   ANTI JOIN samples USING (sample_id)),
                  (SELECT count(*) FROM (SELECT unnest(?::VARCHAR[]) AS id)
                   ANTI JOIN samples USING (id))""",
        [list(sample_ids), list(ids)],
    ).fetchall()
    if numbers or names:
        raise IdError("a sample was erased meanwhile: run the same command again")


def replaced(connection: Connection) -> list[str]:
    """Paths of segments whose place others have taken: what is left of them is garbage."""
    return [path for (path,) in connection.execute(REPLACED).fetchall()]


def _number(connection: Connection, replaces: Sequence[str]) -> int:
    """A new number, or that of the first segment whose place it takes: what came first stays so."""
    [(number,)] = connection.execute(
        """SELECT coalesce(min(segment_id) FILTER (list_contains(?::VARCHAR[], path)),
                           max(segment_id) + 1, 1) FROM segments""",
        [list(replaces)],
    ).fetchall()
    return int(number)


def _retire(connection: Connection, paths: Sequence[str]) -> None:
    """Take segments out, with all rows that say what lies in them."""
    for path in paths:
        found = "SELECT segment_id FROM segments WHERE path = ?"
        for table in ("exposures", "holdout", "moments", "segments"):
            connection.execute(f"DELETE FROM {table} WHERE segment_id IN ({found})", [path])


def hash_of(sample: str) -> int:
    """First 64 bits of BLAKE2b of a sample's id."""
    return int.from_bytes(blake2b(sample.encode(), digest_size=8).digest(), "little")


def _add_samples(connection: Connection, columns: Columns, split: str, at: str) -> None:
    lengths = dict(zip(columns["id"], columns["tokens"], strict=True))
    _arrive(connection, {"id": list(lengths), "tokens": list(lengths.values())})
    connection.execute(
        """INSERT INTO samples
           SELECT (SELECT coalesce(max(sample_id), 0) FROM samples)
                  + row_number() OVER (ORDER BY a.ordinal),
                  a.id, a.id_hash, ?, a.tokens, ?::TIMESTAMP
           FROM arriving a ANTI JOIN samples s ON s.id_hash = a.id_hash AND s.id = a.id
           ORDER BY a.ordinal""",
        [split, at],
    )
    connection.unregister("arriving")


def _insert_by_id(
    connection: Connection, table: str, columns: Columns, run_id: int, segment_id: int
) -> None:
    """Insert rows that name samples by the user's id (or none), of one run and segment."""
    names = {name for name, *_ in connection.execute(f"DESCRIBE {table}").fetchall()}
    own = {"run_id": run_id, "segment_id": segment_id}
    _arrive(connection, columns)
    kept = ", ".join(f'a."{name}"' for name in columns if name in names)
    given = ", ".join(f"{value} AS {name}" for name, value in own.items() if name in names)
    if "id" not in columns:
        source = "FROM arriving a"
    else:
        source = "FROM arriving a JOIN samples s ON s.id_hash = a.id_hash AND s.id = a.id"
        given += ", s.sample_id"
    if table == "exposures":
        source += f""" WHERE NOT EXISTS (SELECT 1 FROM exposures e
            WHERE e.run_id = {run_id} AND e.sample_id = s.sample_id AND e.epoch = a.epoch)
            QUALIFY row_number() OVER (PARTITION BY s.sample_id, a.epoch ORDER BY a.ordinal) = 1"""
    elif table == "holdout_losses":  # a resumed run may measure an epoch again
        source += f""" WHERE NOT EXISTS (SELECT 1 FROM holdout_losses h
            WHERE h.run_id = {run_id} AND h.sample_id = s.sample_id AND h.epoch = a.epoch)"""
    elif table == "steps":  # a resumed run takes some steps again
        source += f""" WHERE NOT EXISTS (SELECT 1 FROM steps t
            WHERE t.run_id = {run_id} AND t.step = a.step)"""
    connection.execute(
        f"INSERT INTO {table} BY NAME SELECT {kept}, {given} {source} ORDER BY a.ordinal"
    )
    connection.unregister("arriving")


def _arrive(connection: Connection, columns: Columns) -> None:
    import pyarrow

    held = {name: list(column) for name, column in columns.items()}
    held["ordinal"] = list(range(len(next(iter(held.values())))))
    if "id" in held:
        held["id_hash"] = pyarrow.array([hash_of(i) for i in held["id"]], pyarrow.uint64())
    connection.register("arriving", pyarrow.table(held))


def _create(root: Path) -> None:
    """Make the catalog in one step: DuckDB cannot open a file that it was killed creating.

    One that is gone, though snapshots of it are there, is its newest snapshot again.
    """
    temporary = root / f".tmp-{NAME}"
    if snapshots := snapshots_of(root):
        with writing(temporary):
            temporary.unlink(missing_ok=True)
            write_durably(temporary, blocks(unlinked(snapshots[-1][1], root)))
    else:
        with new(temporary):
            pass
    replace_durably(temporary, root / NAME)


def snapshots_of(root: Path) -> list[tuple[int, Path]]:
    """The published snapshots by number, the newest last."""
    found = (root / "published").glob("catalog-*.duckdb")
    named = [(re.fullmatch(r"catalog-([0-9]{1,18})", path.stem), path) for path in found]
    return sorted((int(number[1]), path) for number, path in named if number)


def as_json(settings: Mapping[str, Any]) -> str:
    """Settings as they are kept in a JSON column."""
    return json.dumps(settings, sort_keys=True, default=str)


def now() -> datetime:
    """The time as the catalog keeps it: UTC, without a zone."""
    return datetime.now(UTC).replace(tzinfo=None)
