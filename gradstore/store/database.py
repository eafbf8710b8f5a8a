"""DuckDB files: opened to be read by anybody or written by one, made, and migrated."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import duckdb

from gradstore.errors import StoreBusy, StoreDamaged, StoreMissing, StoreTooNew
from gradstore.store.files import unwritable, writing

_LOCKED_DOWN = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "threads": "1",  # look-ups are small: workers that wait for a core cost more than they do
}
_REFUSED = (  # what a full disk, or one that is not to be written, ends in
    duckdb.IOException, duckdb.FatalException, duckdb.TransactionException,
)  # fmt: skip
_opening = threading.Lock()

Connection = duckdb.DuckDBPyConnection


def snapshot(path: Path) -> Connection:
    """A read-only connection to a published snapshot, with no access to files or settings."""
    with _opening:
        return _sealed(open_file(path, read_only=True))


def open_file(path: Path, *, read_only: bool) -> Connection:
    """Open a DuckDB file; what it raises tells a missing one from a busy or a damaged one."""
    settings = _LOCKED_DOWN | ({"temp_directory": ""} if read_only else {})
    try:
        return duckdb.connect(path, read_only=read_only, config=dict(settings))
    except duckdb.IOException as error:
        if not path.exists():
            raise StoreMissing(f"{path} is gone") from error
        if "Could not set lock" in str(error):
            raise StoreBusy(
                f"{path} is open in another program; close it (only the copies in "
                f"{path.parent / 'published'} are meant to be opened)"
            ) from error
        raise StoreDamaged(f"{path} cannot be opened by DuckDB: {error}") from error
    except duckdb.Error as error:
        raise StoreDamaged(f"{path} cannot be opened by DuckDB: {error}") from error


def _sealed(connection: Connection) -> Connection:
    [(sealed,)] = connection.execute("SELECT current_setting('lock_configuration')").fetchall()
    if not sealed:  # else another connection of this process, to the same snapshot, has done it
        connection.execute("SET disabled_filesystems = 'LocalFileSystem'")
        connection.execute("SET lock_configuration = true")
    return connection


@contextmanager
def writable(path: Path) -> Iterator[Connection]:
    """Open a catalog to write, and leave all of it in its main file: a copy has no WAL."""
    with io_errors(path), open_file(path, read_only=False) as connection:
        yield connection
        connection.execute("CHECKPOINT")  # closing would do it too, but swallow an error


@contextmanager
def new(path: Path) -> Iterator[Connection]:
    """A catalog with empty tables, made at a path in place of what may be there unfinished."""
    remove(path.parent.glob(f"{path.name}*"))
    with writable(path) as connection:
        migrate(connection)
        path.chmod(0o600)  # DuckDB makes its file by itself, and takes no empty one
        yield connection


@contextmanager
def io_errors(path: Path) -> Iterator[None]:
    """Turn a refusal by the file system, through DuckDB, into an error that names the path."""
    try:
        yield
    except _REFUSED as error:
        raise unwritable(path, str(error).splitlines()[0]) from error


def remove(paths: Iterable[Path]) -> None:
    """Delete files, those that are gone already too."""
    for path in list(paths):
        with writing(path):
            path.unlink(missing_ok=True)


def migrate(connection: Connection) -> None:
    """Run the scripts of ``schemas/`` that a catalog has not had, each in a transaction."""
    connection.execute(
        """CREATE TABLE IF NOT EXISTS migrations (
               number INTEGER NOT NULL, name VARCHAR NOT NULL, applied_at TIMESTAMP NOT NULL)"""
    )
    done = {number for (number,) in connection.execute("SELECT number FROM migrations").fetchall()}
    scripts = {
        int(script.name.split("_")[0]): script
        for script in files("gradstore.schemas").iterdir()
        if script.name.endswith(".sql")
    }
    if unknown := done - scripts.keys():
        raise StoreTooNew(
            f"the catalog has migrations {sorted(unknown)} that this gradstore does not know; "
            "upgrade with `pip install --upgrade gradstore`"
        )
    for number in sorted(scripts.keys() - done):
        connection.execute("BEGIN")
        connection.execute(scripts[number].read_text())
        connection.execute(
            "INSERT INTO migrations VALUES (?, ?, now()::TIMESTAMP)", [number, scripts[number].name]
        )
        connection.execute("COMMIT")


def unreadable(root: Path, error: duckdb.Error) -> StoreDamaged:
    """The error for a catalog that DuckDB opens but cannot read as gradstore expects."""
    said = str(error).strip().split("\n")[0]
    return StoreDamaged(
        f"the catalog of {root} cannot be read ({said}); see `gradstore verify -s {root}`"
    )
