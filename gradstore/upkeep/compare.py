"""The catalog's rows against the manifests they came from, and what a manifest says of arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from gradstore.store.catalog import NAME, REPLACED, Connection
from gradstore.store.format import ModelIdentity
from gradstore.store.manifest import TABLES

T = TypeVar("T")
_PLACED = ("exposures", "holdout", "moments")  # tables whose rows lie in a segment
_BY_ROW = ("scored", "D", "H", "R_index", "R_value")  # arrays with one row a position


def tables_of(connection: Connection) -> list[str]:
    """The catalog's tables, by name."""
    found = connection.execute("SELECT table_name FROM duckdb_tables() ORDER BY table_name")
    return [name for (name,) in found.fetchall()]


def read(connection: Connection, table: str) -> None:
    """Read every value of a table: DuckDB compares each block with its checksum."""
    quoted = table.replace('"', '""')
    connection.execute(f'SELECT bit_xor(hash(t)) FROM "{quoted}" t').fetchall()


def digest_of(connection: Connection, path: str) -> str:
    """What the catalog says a segment's manifest has as its digest."""
    [(digest,), *_] = connection.execute(
        "SELECT digest FROM segments WHERE path = ?", [path]
    ).fetchall()
    return str(digest)


def ids_of(connection: Connection, path: str) -> tuple[str, ...]:
    """The samples that the catalog says have something in a segment, in the order of numbers."""
    found = connection.execute(
        """SELECT DISTINCT sample_id, id FROM samples
           JOIN (SELECT sample_id, segment_id FROM exposures
                 UNION ALL SELECT sample_id, segment_id FROM holdout) USING (sample_id)
           JOIN segments USING (segment_id) WHERE path = ? ORDER BY sample_id""",
        [path],
    )
    return tuple(id for _, id in found.fetchall())


def ids_in(manifest: Mapping[str, Any]) -> dict[str, None]:
    """The samples that a manifest speaks of, once each."""
    return {id: None for columns in manifest["tables"].values() for id in columns.get("id", ())}


def arrays_of(manifest: Mapping[str, Any]) -> list[str]:
    """The names of a segment's arrays."""
    ending = "/zarr.json"
    return [f.removesuffix(ending) for f in manifest["files"] if f.endswith(ending)]


def shape_of(
    name: str, manifest: Mapping[str, Any], model: ModelIdentity | None
) -> tuple[int | None, int | None]:
    """Rows and columns that an array must have; None where the manifest does not say."""
    tables, rows, width = manifest["tables"], None, None
    name = name.removesuffix(".wide")  # of the profile small: a row for each row of codes
    if name == "tokens":
        rows = sum(sum(tables[t]["tokens"]) for t in ("exposures", "holdout") if t in tables)
    elif "exposures" in tables and (name in _BY_ROW or name.endswith((".A", ".B", ".step"))):
        rows = sum(tables["exposures"]["rows"])
    elif "exposures" in tables and name == "tail":
        rows = 1 + max((t for t in tables["exposures"]["tail_row"] if t is not None), default=-1)
    if model is not None:
        width = {"D": model.width, "H": model.head_width, "tail": model.vocabulary}.get(name)
    return rows, width


def rows(
    connection: Connection, path: str, manifest: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Where the catalog's rows of a segment are not its manifest's: what, and the ids hit.

    A row of the catalog must be in the manifest as it is. One of the manifest must be in the
    catalog by its key alone: of an epoch met twice the first row counts, in whichever segment.
    """
    facts = connection.execute("SELECT * FROM segments WHERE path = ?", [path])
    names = [column[0] for column in facts.description or ()]
    row = dict(zip(names, facts.fetchall()[0], strict=True))
    for name in ("run_id", "kind", "profile", "records", "rows", "bytes"):
        if row[name] != manifest["segment"].get(name):
            yield f"says that {path} has {name} {row[name]!r}, its manifest another", ()
    number, run = int(row["segment_id"]), int(manifest["run"]["run_id"])
    if not connection.execute("SELECT 1 FROM runs WHERE run_id = ?", [run]).fetchall():
        yield f"has no run {run}, of which {path} is", ()
    for table in TABLES.keys() & set(tables_of(connection)):
        columns = manifest["tables"].get(table)
        if columns is not None:
            lost = _lost(connection, table, columns, run)
            if lost:
                said = f"lacks {len(lost)} rows of {table} that the manifest of {path} has"
                yield said, _ids(lost, columns)
        if table in _PLACED:
            other = _other(connection, table, columns, number)
            if other:
                said = f"has {len(other)} rows of {table} that the manifest of {path} has not"
                yield said, _ids(other, columns)


def replaced(connection: Connection) -> set[str]:
    """Paths of segments whose place others have taken; none in a catalog of an older release."""
    columns = {name for name, *_ in connection.execute("DESCRIBE segments").fetchall()}
    if "replaces" not in columns:
        return set()
    return {path for (path,) in connection.execute(REPLACED).fetchall()}


def dangling(connection: Connection, make: Callable[[str, str], T]) -> Iterator[T]:
    """Rows that speak of a segment or a sample which is not in the catalog, or samples twice."""
    for table in _PLACED:
        [(count,)] = connection.execute(
            f"SELECT count(*) FROM {table} ANTI JOIN segments USING (segment_id)"
        ).fetchall()
        if count:
            yield make(NAME, f"has {count} rows of {table} in a segment that it lacks")
    for table in ("exposures", "holdout"):
        [(count,)] = connection.execute(
            f"SELECT count(*) FROM {table} ANTI JOIN samples USING (sample_id)"
        ).fetchall()
        if count:
            yield make(NAME, f"has {count} rows of {table} of samples that it lacks")
    [(twice,)] = connection.execute(
        "SELECT 2 * count(*) - count(DISTINCT sample_id) - count(DISTINCT id) FROM samples"
    ).fetchall()
    if twice:
        yield make(NAME, f"has {twice} ids or numbers of samples twice")


def _lost(
    connection: Connection, table: str, columns: Mapping[str, Any], run: int
) -> list[tuple[Any, ...]]:
    """Keys of a manifest's rows that the catalog does not have."""
    keys = TABLES[table]
    _register(connection, columns)
    joined = " AND ".join(f"said.{key} = kept.{key}" for key in keys)
    try:
        return connection.execute(
            f"""SELECT {", ".join(keys)} FROM said ANTI JOIN
                (SELECT * FROM {table} {_samples(columns)} WHERE run_id = ?) kept ON {joined}""",
            [run],
        ).fetchall()
    finally:
        connection.unregister("said")


def _other(
    connection: Connection, table: str, columns: Mapping[str, Any] | None, number: int
) -> list[tuple[Any, ...]]:
    """The catalog's rows of a segment that its manifest does not have."""
    if columns is None:
        return connection.execute(
            f"SELECT segment_id FROM {table} WHERE segment_id = ?", [number]
        ).fetchall()
    types = {name: kind for name, kind, *_ in connection.execute(f"DESCRIBE {table}").fetchall()}
    names = [n for n in sorted(columns, key=lambda n: n != "id") if n in types or n == "id"]
    kept = ", ".join(f'"{name}"' for name in names)
    said = ", ".join(f'CAST("{n}" AS {types.get(n, "VARCHAR")})' for n in names)
    _register(connection, columns)
    try:
        return connection.execute(
            f"""SELECT {kept} FROM {table} t {_samples(columns)} WHERE segment_id = ?
                EXCEPT ALL SELECT {said} FROM said""",
            [number],
        ).fetchall()
    finally:
        connection.unregister("said")


def _samples(columns: Mapping[str, Any]) -> str:
    return "JOIN (SELECT sample_id, id FROM samples) USING (sample_id)" if "id" in columns else ""


def _register(connection: Connection, columns: Mapping[str, Any]) -> None:
    import pyarrow

    connection.register("said", pyarrow.table({name: list(c) for name, c in columns.items()}))


def _ids(found: list[tuple[Any, ...]], columns: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The ids in rows, which begin with one if they have any."""
    return tuple(dict.fromkeys(row[0] for row in found)) if "id" in (columns or ()) else ()
