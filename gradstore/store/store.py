"""The store: one folder that holds gradients, their catalog, and what was asked of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb

from gradstore.errors import IdError, QueryError, StoreMissing
from gradstore.store import catalog, database, erasures, format, remote
from gradstore.store.functions import FUNCTIONS, functions
from gradstore.store.manifest import segment_path, segment_paths

if TYPE_CHECKING:  # torch and zarr stay unimported until an array is read
    from torch import Tensor

    from gradstore.store.record import LinearLayer, Record
    from gradstore.store.segment import SegmentReader

T = TypeVar("T")
OPEN_SEGMENTS = 20  # segments kept open: up to 11 files each, and macOS grants a process 256
KNOWN_SEGMENTS = 1000  # whose descriptions, some ten kB each, are not read and checked again


class Store:
    """A store opened at a path. ``with Store.open(path) as store:`` closes its connection.

    Opening recovers what a killed writer had made durable but not yet visible. Reading goes to the
    newest published snapshot and is never locked out by a training that writes.
    """

    def __init__(self, root: Path, description: format.StoreFormat) -> None:
        self.root, self.format = root, description
        self._reader: catalog.Connection | None = None
        self._segments: dict[int, SegmentReader] = {}
        self._layers: dict[int, list[LinearLayer]] = {}

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        profile: str = "packed",
        dtype: str = "bfloat16",
        elsewhere: format.Elsewhere | None = None,
    ) -> Store:
        """Make an empty store. Raises :class:`StoreExists` if something is there."""
        return cls(Path(path), format.create(Path(path), profile, dtype, elsewhere))

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a store, entering into its catalog what a crash kept out of it, or in it.

        Raises :class:`StoreMissing`, :class:`StoreDamaged` or :class:`StoreTooNew`; for one that is
        encrypted, :class:`EncryptionError` without its master key.
        """
        store = cls(Path(path), format.unlock(Path(path)))
        if not store.is_current() or (store.root / catalog.ERASING).exists():
            from gradstore.upkeep.recovery import finish

            finish(store)
        return store

    @classmethod
    def open_or_create(cls, store: Store | str | Path) -> Store:
        """A store as given, opened at a path, or made there if nothing is."""
        if isinstance(store, Store):
            return store
        try:
            return cls.open(store)
        except StoreMissing:
            return cls.create(store)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()

    # -- writing -----------------------------------------------------------------------------

    def bind(self, model: format.ModelIdentity, where: str) -> None:
        """Tie an empty store to a model, or check that ``model`` is the one it is tied to.

        Raises :class:`ModelError` naming the first difference.
        """
        if self.format.model is not None:
            self.format.model.check(model, where)
            if self.format.model.tokenizer is not None or model.tokenizer is None:
                return  # else the tokenizer is known from now on
        self.format = replace(self.format, model=model)
        self.format.save(self.root)

    @property
    def model(self) -> format.ModelIdentity:
        """The model that the gradients belong to."""
        if self.format.model is None:
            raise StoreMissing(
                f"the store at {self.root} is empty; fill it with `gradstore ingest "
                f"--store {self.root} ...`"
            )
        return self.format.model

    @contextmanager
    def transaction(self, seconds: float = catalog.LOCK_SECONDS) -> Iterator[catalog.Connection]:
        """Read and write the catalog; commits and publishes at the end, or leaves it unchanged."""
        with catalog.transaction(self.root, seconds) as connection:
            yield connection
        self.refresh()

    def begin_run(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Add a row to ``runs``; returns it. ``facts`` are its columns, ``name`` may be None."""
        with self.transaction() as connection:
            [(run_id,)] = connection.execute(
                "SELECT coalesce(max(run_id), 0) + 1 FROM runs"
            ).fetchall()
            run = {**facts, "run_id": run_id, "status": "running"}
            run["name"] = run.get("name") or f"run-{run_id}"
            run["started_at"] = catalog.now()
            catalog.insert(connection, "runs", {name: [value] for name, value in run.items()})
        return run

    def update_run(self, run_id: int, **columns: Any) -> None:
        """Set columns of one row of ``runs``."""
        if columns.get("status") in ("finished", "failed"):
            columns["finished_at"] = catalog.now()
        assignments = ", ".join(f"{name} = ?" for name in columns)
        with self.transaction() as connection:
            connection.execute(
                f"UPDATE runs SET {assignments} WHERE run_id = ?", [*columns.values(), run_id]
            )

    def add_scores(
        self, request_id: int, metric: str, scores: Sequence[tuple[str, str, float, float | None]]
    ) -> None:
        """Add rows to ``scores`` for a request: (id, role, before, after) each."""
        numbers = self.resolve(i for i, *_ in scores)
        with self.transaction() as connection:
            catalog.insert(
                connection,
                "scores",
                {
                    "request_id": [request_id] * len(scores),
                    "sample_id": [numbers[i] for i, *_ in scores],
                    "role": [role for _, role, *_ in scores],
                    "metric": [metric] * len(scores),
                    "before": [before for *_, before, _ in scores],
                    "after": [after for *_, after in scores],
                },
            )

    def recover(self, seconds: float = catalog.LOCK_SECONDS) -> int:
        """Enter every durable segment that the catalog lacks; returns how many there were.

        Raises :class:`StoreBusy` if the catalog stays locked for longer than ``seconds``.
        """
        from gradstore.upkeep.recovery import recover

        found = recover(self.root, seconds)
        self.refresh()
        return found

    def is_current(self) -> bool:
        """Whether readers see every durable segment."""
        if not catalog.is_published(self.root):
            return False
        on_disk = set(map(self._name, segment_paths(self.root)))
        with suppress(StoreMissing):
            return not on_disk or on_disk <= {p for (p,) in self.rows("SELECT path FROM segments")}
        return False

    # -- reading -----------------------------------------------------------------------------

    def refresh(self) -> None:
        """Let go of what is open: the next read sees what is published by then."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._layers.clear()
        self._segments.clear()

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one read-only query on the newest snapshot."""
        return self._read(sql, parameters, lambda cursor: cursor.fetchall())

    def has(self, table: str) -> bool:
        """Whether the catalog has a table: one written by an older release may not."""
        return bool(self.rows("SELECT 1 FROM duckdb_tables() WHERE table_name = ?", [table]))

    def table(self, sql: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """The same with each row as a dictionary."""
        names, rows = self._read(sql, parameters, lambda c: (c.description, c.fetchall()))
        return [dict(zip([name for name, *_ in names], row, strict=True)) for row in rows]

    def columns(self, sql: str, parameters: Sequence[Any] = ()) -> dict[str, Any]:
        """The same with each column as a NumPy array: for as many rows as there are gradients."""
        return self._read(sql, parameters, lambda cursor: cursor.fetchnumpy())

    def query(self, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
        """A user's query on the newest snapshot: column names and rows.

        Read-only, without access to files, extensions or settings, on a connection of its own, so
        that what it creates is gone afterwards. Time and memory are not limited here but by
        ``gradstore sql``, which gives the statement a process of its own. It may call the functions
        of :mod:`gradstore.store.functions`. Raises :class:`QueryError`, or what a function raises,
        such as :class:`IdError`.
        """
        with catalog.reader(self.root) as connection, functions(connection, self, sql):
            return catalog.query(connection, sql)

    def schema(self, name: str | None = None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Tables, views and functions, and their columns, with comments; all or one by name."""
        tables = self.table(
            """SELECT table_name AS name, 'table' AS kind, comment FROM duckdb_tables()
               UNION ALL SELECT view_name, 'view', comment FROM duckdb_views() WHERE NOT internal
               ORDER BY kind, name"""
        )
        tables += [
            {"name": f.name, "kind": "function", "comment": f"{f.comment} ({f.arguments})"}
            for f in FUNCTIONS
        ]
        tables = [t for t in tables if name in (None, t["name"]) and t["name"] != "migrations"]
        if not tables:
            raise QueryError(f"the catalog has no table {name!r}; `gradstore schema` lists them")
        names = [t["name"] for t in tables]
        columns = self.table(
            """SELECT table_name AS "table", column_name AS "column", data_type AS type,
                      coalesce(comment, '') AS comment
               FROM duckdb_columns() WHERE list_contains(?, table_name)
               ORDER BY table_name, column_index""",
            [names],
        )
        columns += [
            {"table": f.name, "column": column, "type": kind, "comment": comment}
            for f in FUNCTIONS
            for column, kind, comment in f.columns
            if f.name in names
        ]
        return tables, columns

    def stats(self) -> dict[str, Any]:
        """Counts and sizes; bytes per gradient include the catalog and every file of segments."""
        from gradstore.store.stats import stats

        return stats(self)

    def resolve(self, ids: Iterable[str]) -> dict[str, int]:
        """Map ids, or unambiguous beginnings of ids, to sample numbers.

        Returns ``{full id: sample_id}`` in the order given. Raises :class:`IdError` for an id that
        names no sample, or several.
        """
        given = list(ids)
        hashes = [catalog.hash_of(id) for id in given]
        sought: list[Any] = [hashes]
        same = "id_hash IN (SELECT unnest(?::UBIGINT[]))"
        if len(given) == 1:  # a join would take four times as long
            same, sought = "id_hash = ?", hashes
        exact = dict(self.rows(f"SELECT id, sample_id FROM samples WHERE {same}", sought))
        return dict((id, exact[id]) if id in exact else self._beginning(id) for id in given)

    def _beginning(self, given: str) -> tuple[str, int]:
        """The one id that begins so, and its sample number. Raises :class:`IdError`."""
        matches: list[tuple[str, int]] = self.rows(
            "SELECT id, sample_id FROM samples WHERE starts_with(id, ?) ORDER BY id LIMIT 4",
            [given],
        )
        if not matches or not given:
            asked = f"{given!r}{erasures.note(self, given)}"
            raise IdError(f"no sample has the id {asked}; list them with `gradstore list`")
        if len(matches) > 1:
            some = ", ".join(id for id, _ in matches[:3])
            raise IdError(f"{given!r} is the beginning of several ids ({some}, ...); give more")
        return matches[0]

    def run(self, name: str | int | None = None) -> dict[str, Any]:
        """One row of ``runs``: by name or number, else the newest. Raises :class:`IdError`."""
        runs = self.table("SELECT * FROM runs ORDER BY run_id")
        wanted = [r for r in runs if name is None or str(name) in (r["name"], str(r["run_id"]))]
        if not wanted:
            known = ", ".join(r["name"] for r in runs) or "none yet"
            asked = "run" if name is None else f"run {str(name)!r}"
            raise IdError(f"the store has no {asked}; it has: {known}")
        return wanted[-1]

    def records(
        self, sample_ids: Sequence[int], run_id: int, *, first_only: bool = False
    ) -> Iterator[Record]:
        """These samples' stored records in a run, or the first of each, by sample and epoch."""
        if not (ids := list(sample_ids)):
            return
        ends = [min(ids), max(ids)]  # of both tables: zone maps answer a range, not a list
        places = self.table(
            """SELECT * FROM exposures e JOIN samples s USING (sample_id)
               WHERE run_id = ? AND sample_id IN (SELECT unnest(?::BIGINT[]))
                 AND e.sample_id BETWEEN ? AND ? AND s.sample_id BETWEEN ? AND ?
               QUALIFY NOT ? OR row_number() OVER (PARTITION BY sample_id ORDER BY epoch) = 1
               ORDER BY list_position(?, sample_id), epoch""",
            [run_id, ids, *ends, *ends, first_only, ids],
        )
        yield from map(self.record_at, places)

    def record_at(self, place: Mapping[str, Any]) -> Record:
        """The record of one row of ``exposures`` joined with its sample's ``id``."""
        from gradstore.store.record import Exposure

        exposure = Exposure(**{field.name: place[field.name] for field in fields(Exposure)})
        layers = self.layers(place["run_id"])
        return self.segment(place["segment_id"]).record(exposure, place, layers)

    def layers(self, run_id: int) -> list[LinearLayer]:
        """The linear layers that a run captured besides the embedding, in the model's order."""
        from gradstore.store.record import LinearLayer

        if run_id not in self._layers:
            kept = []
            if self.has("layers"):
                kept = self.table(
                    "SELECT * EXCLUDE run_id FROM layers WHERE run_id = ? ORDER BY rowid", [run_id]
                )
            self._layers[run_id] = [LinearLayer(**row) for row in kept]
        return self._layers[run_id]

    def tokens(self, sample_ids: Sequence[int], run_id: int) -> dict[int, Tensor]:
        """Token ids of a run's training or held-out samples, by number (those that have any)."""
        places = self.rows(
            """SELECT sample_id, min(segment_id), arg_min(token_start, segment_id),
                      arg_min(count, segment_id)
               FROM (SELECT run_id, sample_id, segment_id, token_start, "rows" + 1 AS count
                     FROM exposures
                     UNION ALL
                     SELECT run_id, sample_id, segment_id, token_start, tokens FROM holdout)
               WHERE run_id = ? AND list_contains(?, sample_id) GROUP BY sample_id""",
            [run_id, list(sample_ids)],
        )
        return {
            sample: self.segment(segment).tokens(start, count)
            for sample, segment, start, count in places
        }

    def moments(self, run_id: int, layer: str, moment: str) -> tuple[Tensor, int] | None:
        """Adam's second moment of a layer and the step it was taken at, or None if not kept.

        ``layer`` is ``embedding``, ``position``, ``head``, or a captured layer's parameter;
        ``moment`` is ``first-epoch``, ``end``, or ``start``: the weight itself, before any step.
        """
        kept = self.rows(
            """SELECT segment_id, step FROM moments
               WHERE run_id = ? AND layer = ? AND moment = ? ORDER BY step""",
            [run_id, layer, moment],
        )
        if not kept:
            return None
        segment, step = kept[-1]
        return self.segment(segment).tensor(layer), step

    def segment(self, segment_id: int) -> SegmentReader:
        """The reader of a segment; the files of those read last stay open."""
        from gradstore.store.segment import SegmentReader

        if (reader := self._segments.pop(segment_id, None)) is None:
            paths = self.rows("SELECT path FROM segments WHERE segment_id = ?", [segment_id])
            path = segment_path(self.root, paths[0][0] if paths else None)
            if self.format.elsewhere is not None:
                remote.used(path)
            reader = SegmentReader(path)
        self._segments[segment_id] = reader  # the last, as it is read last
        for idle in islice(reversed(self._segments.values()), OPEN_SEGMENTS, OPEN_SEGMENTS + 1):
            idle.close()
        # files of segments that lie elsewhere come and go
        known = KNOWN_SEGMENTS if self.format.elsewhere is None else OPEN_SEGMENTS
        if len(self._segments) > known:
            del self._segments[next(iter(self._segments))]
        return reader

    def _read(self, sql: str, parameters: Sequence[Any], take: Callable[[Any], T]) -> T:
        if self._reader is None:
            self._reader = catalog.reader(self.root)
        try:
            return take(self._reader.execute(sql, list(parameters)))
        except duckdb.Error as error:
            raise database.unreadable(self.root, error) from error

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()
