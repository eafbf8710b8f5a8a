"""Makes a damaged store sound again with what is left of it; nothing is deleted.

The catalog is made anew from the manifests of sound segments. Tables that no manifest fills
(samples' numbers, runs' ends, requests, scores, receipts, ...) are copied from the catalog or the
newest snapshot that can still read them. What is damaged is renamed into ``quarantine/``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from gradstore.errors import StoreBusy, StoreDamaged, StoreError, StoreMissing, StoreTooNew
from gradstore.store import audit, catalog, database, erasures, remote
from gradstore.store.files import (
    QUARANTINE,
    RECEIPTS,
    SEAL,
    blocks,
    make_folder,
    replace_durably,
    sync_folder,
    unlinked,
    write_durably,
    writing,
)
from gradstore.store.manifest import TABLES, read_manifest, replaces, segment_paths
from gradstore.upkeep import compare
from gradstore.upkeep.finding import Finding
from gradstore.upkeep.verify import Progress, examine

_OWN = {"migrations", "segments", *TABLES}  # made again, not copied


@dataclass(frozen=True)
class Action:
    """What was done about a file, or what was not; ``ids`` are those that lost something by it."""

    file: str
    did: str
    ids: tuple[str, ...] = ()


def repair(
    root: Path, progress: Progress = lambda done, total: None, *, dry_run: bool = False
) -> list[Action]:
    """Repair what :func:`gradstore.upkeep.verify.verify` finds; says all that it did, in order.

    With ``dry_run`` nothing is changed. Raises :class:`StoreBusy` if the catalog stays locked, and
    what opening a store of the future, or none, raises.
    """
    if not root.is_dir():
        list(examine(root))  # raises
    with catalog.lock(root / "catalog.lock", catalog.LOCK_SECONDS, "repairing"):
        findings = list(examine(root, progress))
        damaged = [finding for finding in findings if finding.damage]
        actions = list(_mend(root, damaged, dry_run))
        lost = erasures.KEY in {finding.file for finding in damaged}
        mended = {action.file for action in actions} | {erasures.KEY}
        damaged = [finding for finding in damaged if finding.file not in mended]
        aside = _set_aside(root, damaged)
        actions += [Action(p, "set aside", _hit(damaged, p)) for p in aside]
        done = {*aside}
        if any(_of_catalog(f.file) or _within(f.file, aside, "segments") for f in damaged):
            with tempfile.TemporaryDirectory(prefix="gradstore-") as folder:
                made = Path(folder) / catalog.NAME
                actions += _make(root, made, aside)
                if not dry_run:
                    _install(root, made, damaged)
            done |= {f.file for f in damaged if _of_catalog(f.file)}
        if not dry_run:
            for path in aside:
                _quarantine(root, path)
        actions += _remove_temporaries(root, dry_run)
        left = [f for f in damaged if f.file not in done and not _within(f.file, aside)]
        actions += [Action(f.file, f"left as it is: it {f.what}", f.ids) for f in left]
    if lost:
        did = "what was erased under it is no longer refused"
        actions.append(Action(erasures.KEY, did if dry_run else f"{did}: {_let_in(root)} records"))
    if actions and not dry_run:
        _record(root, actions)
    return actions


def _let_in(root: Path) -> int:
    """Do without the key of what was erased: nobody can tell any more what to refuse."""
    if os.path.lexists(root / erasures.KEY):
        _quarantine(root, erasures.KEY)
    with catalog.transaction(root) as connection:
        return erasures.give_up(connection)


def _record(root: Path, actions: Sequence[Action]) -> None:
    """Keep what a repair did in the audit chain, in figures."""
    ids = {id for action in actions for id in action.ids}
    with catalog.transaction(root) as connection:
        audit.append(connection, "repair", "store", {"actions": len(actions), "hit": len(ids)})


def _mend(root: Path, damaged: Sequence[Finding], dry_run: bool) -> Iterator[Action]:
    """Where segments lie elsewhere, what is damaged in one place may be sound in the other."""
    try:
        elsewhere = remote.of(root)
    except (StoreDamaged, StoreMissing):  # of the description
        elsewhere = None
    files = dict.fromkeys(f.file for f in damaged if f.file.startswith("segments/"))
    if elsewhere is None or not files:
        return
    elsewhere.check_ours()  # else all segments would seem lost
    for file in files:
        name, file_of = "/".join(file.split("/")[:3]), "/".join(file.split("/")[3:])
        here = any(not f.what.startswith("at ") for f in damaged if f.file == file)
        with suppress(StoreDamaged):
            if did := elsewhere.mend(name, file_of, here=here, dry_run=dry_run):
                yield Action(file, did)


# -- what is damaged -------------------------------------------------------------------------


def _of_catalog(file: str) -> bool:
    return file.startswith((catalog.NAME, "published"))


def _set_aside(root: Path, damaged: Sequence[Finding]) -> list[str]:
    """The folders of segments and sketches in which something is damaged, and that are there."""
    folders = {
        "/".join(finding.file.split("/")[:3])
        for finding in damaged
        if finding.file.startswith(("segments/", "sketches/")) and finding.file.count("/") > 1
    }
    return sorted(f for f in folders if os.path.lexists(root / f) and _reached(root / f, root))


def _reached(path: Path, root: Path) -> bool:
    """Whether a folder is the store's own: nothing is renamed behind a link."""
    try:
        unlinked(path.parent, root)
    except StoreDamaged:
        return False
    return True


def _within(file: str, folders: Sequence[str], top: str = "") -> bool:
    if top == "segments" and file.startswith("segments/") and file.count("/") == 2:
        return True  # a segment that is gone
    return any(f"{file}/".startswith(f"{folder}/") for folder in folders if folder.startswith(top))


def _hit(damaged: Sequence[Finding], folder: str) -> tuple[str, ...]:
    ids = {id: None for f in damaged if _within(f.file, [folder]) for id in f.ids}
    return tuple(ids) if folder.startswith("segments/") else ()  # sketches are made again


# -- the catalog -----------------------------------------------------------------------------


def _make(root: Path, made: Path, aside: list[str]) -> Iterator[Action]:
    """Fill a new catalog at ``made``; says from where, and what could not be read anywhere."""
    with ExitStack() as opened, database.new(made) as target:
        sources = []
        for path in _copies(root):
            try:
                sources.append((path.name, opened.enter_context(database.snapshot(path))))
            except StoreError:
                continue
        _check_age(target, sources)
        target.execute("BEGIN")
        found = _copy_tables(target, sources)
        for table, name in found.items():
            if name is None:
                what = f"the table {table} could not be read anywhere: what it had is lost"
                yield Action(catalog.NAME, what)
        names = dict.fromkeys(name for name in found.values() if name)
        held = ", ".join(names) or "nothing else: requests and scores, if there were any, are lost"
        paths = [
            path
            for path in _in_order(root, sources)
            if path.relative_to(root).as_posix() not in aside
        ]
        target.execute("COMMIT")
        # their contents live on in other segments, or were erased
        gone = {name for path in paths for name in replaces(path)}
        paths = [path for path in paths if path.relative_to(root).as_posix() not in gone]
        for path in paths:
            name = path.relative_to(root).as_posix()
            try:
                target.execute("BEGIN")
                catalog.commit_segment(target, name, read_manifest(path))
                target.execute("COMMIT")
            except StoreDamaged as error:  # its digests agree with what no segment can say
                target.execute("ROLLBACK")
                aside.append(name)
                yield Action(name, f"set aside: {error}")
        yield Action(catalog.NAME, f"made anew from {len(paths)} segments and {held}")
        yield from _without_records(target, sources)


def _check_age(
    target: catalog.Connection, sources: Sequence[tuple[str, catalog.Connection]]
) -> None:
    """Refuse to make less of a catalog that a newer gradstore wrote."""
    sql = "SELECT number FROM migrations"
    for name, source in sources:
        with suppress(duckdb.Error):
            unknown = {*source.execute(sql).fetchall()} - {*target.execute(sql).fetchall()}
            if unknown:
                raise StoreTooNew(
                    f"{name} was written by a newer gradstore, which has to repair it; upgrade "
                    "with `pip install --upgrade gradstore`"
                )


def _copies(root: Path) -> list[Path]:
    """The catalog and its snapshots, the newest first: DuckDB tells by its own checksums which of
    them can be read."""
    copies = [root / catalog.NAME, *(path for _, path in reversed(catalog.snapshots_of(root)))]
    return [path for path in copies if path.is_file() and not path.is_symlink()]


def _copy_tables(
    target: catalog.Connection, sources: Sequence[tuple[str, catalog.Connection]]
) -> dict[str, str | None]:
    """Copy what only the catalog had; returns where each table was read, None if nowhere.

    Rows that name samples by number mean nothing without the table that numbers them.
    """
    tables = [t for t in compare.tables_of(target) if t not in _OWN]
    found: dict[str, str | None] = {}
    for table in sorted(tables, key=lambda table: table != "samples"):
        columns = [name for name, *_ in target.execute(f"DESCRIBE {table}").fetchall()]
        if "sample_id" in columns and found.get("samples", "") is None:
            found[table] = None
            continue
        had = [source for source in sources if _has(source[1], table)]
        read = next((name for name, source in had if _copy(target, source, table, columns)), None)
        if had or sources:
            found[table] = read
            if not had:  # made by a later release than the copies
                del found[table]
    return found


def _has(source: catalog.Connection, table: str) -> bool:
    try:
        return table in compare.tables_of(source)
    except duckdb.Error:
        return False


def _copy(
    target: catalog.Connection, source: catalog.Connection, table: str, columns: Sequence[str]
) -> bool:
    try:
        rows: Any = source.sql(f"SELECT * FROM {table}").to_arrow_table()
        target.register("copied", rows.select([c for c in rows.column_names if c in columns]))
        target.execute(f"INSERT INTO {table} BY NAME SELECT * FROM copied")
        target.unregister("copied")
    except (duckdb.Error, ValueError):
        return False
    return True


def _in_order(root: Path, sources: Sequence[tuple[str, catalog.Connection]]) -> list[Path]:
    """Segments as they were entered before: samples are numbered in this order."""
    entered: dict[str, int] = {}
    for _, source in sources:
        try:
            rows = source.execute("SELECT path, segment_id FROM segments").fetchall()
        except duckdb.Error:
            continue
        entered = dict(rows)
        break

    def place(path: Path) -> tuple[Any, ...]:
        number = entered.get(path.relative_to(root).as_posix())
        if number is not None:
            return False, number, ""
        try:
            return True, 0, min([path.relative_to(root).as_posix(), *replaces(path)])
        except StoreDamaged:  # one of those that are set aside
            return True, 0, ""

    return sorted(segment_paths(root), key=place)


def _without_records(
    target: catalog.Connection, sources: Sequence[tuple[str, catalog.Connection]]
) -> Iterator[Action]:
    """Which samples had a record before and have none now."""
    sql = "SELECT id FROM samples SEMI JOIN exposures USING (sample_id) ORDER BY sample_id"
    now = {id for (id,) in target.execute(sql).fetchall()}
    for _, source in sources:
        try:
            before = source.execute(sql).fetchall()
        except duckdb.Error:
            continue
        lost = tuple(id for (id,) in before if id not in now)
        if lost:
            yield Action(catalog.NAME, f"{len(lost)} samples have no gradient any more", lost)
        return


def _install(root: Path, made: Path, damaged: Sequence[Finding]) -> None:
    """Put the new catalog in place at once, and publish it; what was there is kept aside."""
    if (root / catalog.NAME).exists():
        copy = _free(root, catalog.NAME)
        make_folder(copy.parent)
        write_durably(copy, blocks(root / catalog.NAME))
    temporary = root / f".tmp-{catalog.NAME}"
    with writing(temporary):
        temporary.unlink(missing_ok=True)
        write_durably(temporary, blocks(made))
        wal = root / f"{catalog.NAME}.wal"
        if wal.exists():
            _quarantine(root, wal.name)
    replace_durably(temporary, root / catalog.NAME)
    for file in {f.file.removesuffix(SEAL) for f in damaged if f.file.startswith("published/")}:
        for name in (file, f"{file}{SEAL}"):
            if os.path.lexists(root / name):
                _quarantine(root, name)
    make_folder(root / "published")
    catalog.publish(root)


# -- files -----------------------------------------------------------------------------------


def _quarantine(root: Path, name: str) -> None:
    target = _free(root, name)
    make_folder(target.parent)
    replace_durably(root / name, target)
    sync_folder((root / name).parent)


def _free(root: Path, name: str) -> Path:
    """A name in the quarantine that nothing has yet."""
    target, number = unlinked(root / QUARANTINE / name, root), 1
    while os.path.lexists(target):
        number += 1
        target = target.with_name(f"{Path(name).name}.{number}")
    return target


def _remove_temporaries(root: Path, dry_run: bool) -> Iterator[Action]:
    """What killed writers left, where no writer lives: it never was part of the store."""
    for folder in (root, root / "published", root / RECEIPTS):
        yield from _remove(root, folder, dry_run)
    for folder in sorted((root / "segments").glob("r[0-9]*")):
        if not any(folder.glob(".tmp-*")) or folder.is_symlink():
            continue
        try:
            with catalog.lock(folder / "lock", 0, "ingesting into"):
                yield from _remove(root, folder, dry_run)
        except StoreBusy:
            name = folder.relative_to(root).as_posix()
            yield Action(name, "left as it is: a writer is at work there")


def _remove(root: Path, folder: Path, dry_run: bool) -> Iterator[Action]:
    removers: dict[bool, Callable[[Path], None]] = {True: shutil.rmtree, False: os.unlink}
    for path in sorted(folder.glob(".tmp-*")):
        if not dry_run:
            with writing(path):
                removers[path.is_dir() and not path.is_symlink()](path)
        yield Action(path.relative_to(root).as_posix(), "removed: it was never finished")
