"""Erasing: a record's gradients, tokens and figures leave the store, and are searched for.

``forget`` changes a model, ``erase`` deletes stored data. Segments that hold the record are written
again without it; one transaction takes them in and its rows out; the catalog moves to a new file.
From the first transaction on, a file in the store says that an erasure is under way, and whoever
opens the store next finishes what a crash interrupted: every step can be done again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradstore.errors import IdError, KeyShredded
from gradstore.store import audit, catalog, keys, remote
from gradstore.store.catalog import ERASING, Connection
from gradstore.store.erasures import Names, known, make_key
from gradstore.store.files import QUARANTINE, RECEIPTS, UNFINISHED, sync_folder, unlinked, writing
from gradstore.store.manifest import MANIFEST, read_manifest, segment_path, segment_paths
from gradstore.store.segment import SegmentReader
from gradstore.store.store import Store
from gradstore.upkeep import compare
from gradstore.upkeep.recovery import alone
from gradstore.upkeep.rewrite import rewrite
from gradstore.upkeep.search import Reads, Search, search, tells, traces, word
from gradstore.upkeep.segments import check_segment

_PATHS = (  # texts that the user chose
    ("runs", "checkpoint"), ("checkpoints", "path"), ("requests", "model_in"),
    ("requests", "model_out"), ("evaluations", "model"), ("evaluations", "original"),
    ("evaluations", "reference"),
)  # fmt: skip


@dataclass(frozen=True)
class Erasure:
    """What an erasure takes, or took, out of a store.

    ``ids`` are erased; ``again`` were erased earlier, and are only searched for. ``rows`` counts
    the catalog's rows by table, ``segments`` are the paths of those written again, ``updates`` the
    requests whose stored update goes. ``unforgotten`` are the ids that no request has made a model
    forget: their gradients would have served for that. ``search`` is None for a dry run.
    """

    ids: list[str]
    again: list[str]
    rows: dict[str, int]
    segments: list[str]
    updates: list[int]
    unforgotten: list[str]
    search: Search | None


def erase(
    store: Store,
    ids: Sequence[str],
    *,
    reads: Reads | None = None,
    dry_run: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Erasure:
    """Take samples (by their ids in full) out of a store, and search for what is left of them.

    What stays is the same to the bit. ``reads`` says what token ids read as: then their text is
    searched for too. Tails that a micro-batch shared stay with its other samples.
    Raises :class:`IdError`, :class:`StoreDamaged` where a segment that holds one is not what was
    written, or :class:`StoreBusy` while another process ingests, sketches or erases.
    """
    held = {id for (id,) in store.rows("SELECT id FROM samples WHERE list_contains(?, id)", [ids])}
    again = [id for id in known(store, ids) if id not in held]
    samples = store.resolve(id for id in ids if id not in again)
    if shortened := sorted(samples.keys() - set(ids)):
        raise IdError(f"erasing wants ids in full: give {shortened[0]!r} if that is meant")
    if dry_run:
        return _plan(store, samples, again)
    with alone(store):
        planned = _plan(store, samples, again)
        for path in planned.segments:
            check_segment(store.root, path)  # for rewriting would give damage new digests
        marks = traces(store, samples, reads)
        if samples:
            _empty_quarantine(store.root)
            _mark(store, samples)
            _finish(store, progress)
        progress("searching every byte of the store")
        found = search(store, [*planned.ids, *again], marks)
        said = asdict(found) | {"skipped": len(found.skipped), "hits": len(found.hits)}
        with store.transaction() as connection:
            audit.append(connection, "search", _subject(store, [*planned.ids, *again]), said)
    return Erasure(**{**vars(planned), "search": found})


def resume(store: Store) -> None:
    """Finish an erasure that a crash interrupted.

    Raises :class:`StoreBusy` if it goes on, or :class:`StoreUnwritable`.
    """
    with alone(store), writing(store.root):
        _finish(store)


# -- inside ----------------------------------------------------------------------------------


def _plan(store: Store, samples: dict[str, int], again: list[str]) -> Erasure:
    numbers = list(samples.values())
    rows: dict[str, int] = {}
    for table, column in _naming(store.rows):
        [(count,)] = store.rows(
            f"SELECT count(*) FROM {table} WHERE list_contains(?, {column})", [numbers]
        )
        rows[table] = max(count, rows.get(table, 0))
    forgotten = {
        id
        for (id,) in store.rows(
            """SELECT DISTINCT id FROM scores JOIN samples USING (sample_id)
               WHERE role = 'forget' AND after IS NOT NULL"""
        )
    }
    return Erasure(
        list(samples),
        again,
        {table: count for table, count in rows.items() if count},
        [path.relative_to(store.root).as_posix() for path in _touched(store.root, samples)],
        [number for number in _requests(store.rows, numbers) if _update(store, number).exists()],
        [id for id in samples if id not in forgotten],
        None,
    )


def _mark(store: Store, samples: dict[str, int]) -> None:
    """Say durably what is to go, so that it goes whatever happens from here on."""
    with writing(store.root):
        make_key(store.root)
    names = Names(store)
    hashes: dict[int, set[str | None]] = {number: set() for number in samples.values()}
    for run in store.table("SELECT run_id FROM runs"):
        for sample in samples.values():
            with suppress(KeyShredded):  # it was erased: this is a backup that was put back
                for number, tokens in store.tokens([sample], run["run_id"]).items():
                    hashes[number].add(names.now(tokens))
    with writing(store.root / ERASING):
        (store.root / ERASING).touch()
        sync_folder(store.root)
    with store.transaction() as connection:
        for id, number in samples.items():
            older = "DELETE FROM erasures WHERE list_contains(?, id_hash)"
            connection.execute(older, [names.all(id)])
            for hash in hashes[number] or {None}:
                row = (names.now(id), hash, number, catalog.now())
                connection.execute("INSERT INTO erasures VALUES (?, ?, ?, ?, NULL)", row)


def _finish(store: Store, progress: Callable[[str], None] = lambda _: None) -> None:
    """Take out what is marked. Whatever of it is done already is left as it is."""
    going = dict(store.rows("SELECT id, sample_id FROM erasures JOIN samples USING (sample_id)"))
    if going:
        for number in _requests(store.rows, list(going.values())):
            keys.discard(store.root, f"{RECEIPTS}/{_update(store, number).name}")
            _update(store, number).unlink(missing_ok=True)
        shutil.rmtree(unlinked(store.root / UNFINISHED, store.root), ignore_errors=True)
        hashes = {catalog.hash_of(id) for id in going}
        touched, rewritten = _touched(store.root, going), []
        for path in touched:
            progress(f"writing {path.relative_to(store.root)} again")
            profile = read_manifest(path)["segment"]["profile"]
            rewritten.append(rewrite(store.root, [path], _others(going, hashes), profile))
            remote.send(store.root, rewritten[-1])
        _shred(store, going, touched)
        with store.transaction() as connection:
            for path in rewritten:
                name = path.relative_to(store.root).as_posix()
                catalog.commit_segment(connection, name, read_manifest(path))
            _delete(connection, going)
            said = {"samples": len(going), "segments": len(rewritten)}
            audit.append(connection, "erase", _subject(store, going), said)
    progress("moving the catalog to a new file")
    for (name,) in store.rows(catalog.REPLACED):
        remote.discard(store.root, segment_path(store.root, name))
    _clear_receipts(store)
    for unfinished in store.root.glob(f"{remote.TEMPORARY}*"):
        unfinished.unlink(missing_ok=True)
    store.refresh()
    catalog.renew(store.root)
    (store.root / ERASING).unlink(missing_ok=True)
    sync_folder(store.root)


def _clear_receipts(store: Store) -> None:
    """Remove what killed requests left there: an update is the sum of a record's steps."""
    known = store.rows("SELECT request_id FROM receipts WHERE update_digest IS NOT NULL")
    kept = {_update(store, number) for (number,) in known}
    folder = unlinked(store.root / RECEIPTS, store.root)
    for file in (*folder.glob(".tmp-*"), *folder.glob("*.safetensors")):
        if file not in kept:
            keys.discard(store.root, f"{RECEIPTS}/{file.name}")
            file.unlink(missing_ok=True)


def _empty_quarantine(root: Path) -> None:
    """Remove what a repair has set aside; the arrays of its segments may lie elsewhere still."""
    aside = unlinked(root / QUARANTINE, root)
    if (elsewhere := remote.of(root)) is not None:
        for path in aside.glob("segments/r[0-9]*/[0-9]*"):
            name = f"segments/{path.parent.name}/{path.name.partition('.')[0]}"
            if not segment_path(root, name).exists():  # else it was put back
                elsewhere.remove(name)
    shutil.rmtree(aside, ignore_errors=True)


def _shred(store: Store, going: dict[str, int], touched: Sequence[Path]) -> None:
    """Make every copy of what goes unreadable, wherever it lies; what stays is written again."""
    if keys.is_encrypted(store.root):
        live = {path.relative_to(store.root).as_posix() for path in segment_paths(store.root)}
        gone = {path.relative_to(store.root).as_posix() for path in touched}
        keys.shred(store.root, going, live - gone)


def _others(going: dict[str, int], hashes: set[int]) -> Callable[[Any], bool]:
    return lambda row: row["id"] not in going if "id" in row else row["id_hash"] not in hashes


def _touched(root: Path, samples: dict[str, int]) -> list[Path]:
    """Segments whose manifest names one of ``samples``, and orders that list one.

    By the manifests and not by the catalog: a record that came twice is there once. Where those are
    sealed, by the keys; segments of a backup in which a key was shredded are written again too.
    """
    named = [json.dumps(id).encode() for id in samples]
    held = keys.holding(root, samples) if samples and keys.is_encrypted(root) else set[str]()
    hashes = {catalog.hash_of(id) for id in samples}
    found = []
    for path in segment_paths(root) if samples else ():
        text = (path / MANIFEST).read_bytes()
        if path.relative_to(root).as_posix() in held:
            found.append(path)
        elif any(name in text for name in named):
            if samples.keys() & compare.ids_in(read_manifest(path)).keys():
                found.append(path)
        elif b'"kind": "order"' in text:
            order = SegmentReader(path).tensor("order").tolist()
            if hashes & {key % (1 << 64) for key in order}:
                found.append(path)
    return found


Rows = Callable[[str, Sequence[Any]], list[tuple[Any, ...]]]


def _naming(rows: Callable[[str], list[tuple[Any, ...]]]) -> list[tuple[str, str]]:
    """The tables whose rows name a sample, with the column that does."""
    return rows(
        """SELECT table_name, column_name FROM duckdb_columns()
           JOIN duckdb_tables() USING (database_name, schema_name, table_name)
           WHERE column_name IN ('sample_id', 'of_sample_id') AND table_name <> 'erasures'
           ORDER BY ALL"""
    )


def _requests(rows: Rows, numbers: Sequence[int]) -> list[int]:
    """Requests to forget one of the samples."""
    found = rows(
        """SELECT DISTINCT request_id FROM scores
           WHERE role = 'forget' AND list_contains(?, sample_id) ORDER BY ALL""",
        [list(numbers)],
    )
    return [number for (number,) in found]


def _update(store: Store, number: int) -> Path:
    return unlinked(store.root / RECEIPTS / f"{number:04d}.safetensors", store.root)


def _delete(connection: Connection, going: dict[str, int]) -> None:
    """Take out all rows about samples, and what other rows say of them."""

    def rows(sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return connection.execute(sql, list(parameters)).fetchall()

    numbers, questions = list(going.values()), [f"id:{id}" for id in going]
    words = [id for id in going if tells(id)]  # others stand in paths for something else
    asked = "SELECT influence_id FROM influence_runs WHERE list_contains(?, query)"
    rows(f"DELETE FROM influences WHERE influence_id IN ({asked})", [questions])
    rows("DELETE FROM influence_runs WHERE list_contains(?, query)", [questions])
    requests = _requests(rows, numbers)
    rows("DELETE FROM paths WHERE list_contains(?, request_id)", [requests])
    theirs = "SELECT evaluation_id, role FROM measurements WHERE list_contains(?, sample_id)"
    rows(  # a mean of several, with the others' values, gives the one that is missing
        f"DELETE FROM measurements WHERE sample_id IS NULL AND (evaluation_id, role) IN ({theirs})",
        [numbers],
    )
    rows("UPDATE receipts SET update_digest = NULL WHERE list_contains(?, request_id)", [requests])
    for number, settings in rows("SELECT request_id, settings FROM requests"):
        known = json.loads(settings or "{}")
        notes = known.get("notes", [])
        kept = [note for note in notes if not any(word(id).search(note) for id in words)]
        if kept != notes:
            told = catalog.as_json(known | {"notes": kept})
            rows("UPDATE requests SET settings = ? WHERE request_id = ?", [told, number])
    for table, column in _PATHS:
        for number, path in rows(f"SELECT rowid, {column} FROM {table}"):
            for id in (id for id in words if path and word(id).search(path)):
                path = word(id).sub("erased", path)
                rows(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", [path, number])
    for table, column in _naming(rows):
        rows(f"DELETE FROM {table} WHERE list_contains(?, {column})", [numbers])
    rows("UPDATE erasures SET sample_id = NULL")


def _subject(store: Store, ids: Sequence[str] | dict[str, int]) -> str:
    return " ".join(sorted(map(Names(store).now, ids)))
