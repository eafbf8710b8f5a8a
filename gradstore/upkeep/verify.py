"""Is a store what was written? Every file against its digest, every row against its segment.

A bit that flips in any file that says something is found: segments and sketches have manifests,
receipts are in the catalog, snapshots and signatures have their SHA-256 beside them, the catalog is
what its newest snapshot is a copy of, and ``gradstore.json`` holds its own digest. Lock files say
nothing but who holds them. Nothing here writes, but for the name in the catalog's lock.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import duckdb

from gradstore.errors import StoreDamaged, StoreError, StoreMissing, StoreTooNew, StoreUnwritable
from gradstore.store import audit, catalog, database, erasures, format, keys, remote
from gradstore.store.files import SEAL, canonical, read_json, sealed, sha256_of, unlinked
from gradstore.store.manifest import MOST_BYTES
from gradstore.store.manifest import segment_paths as paths_of
from gradstore.upkeep import compare, segments
from gradstore.upkeep.finding import Finding
from gradstore.upkeep.segments import walk

Progress = Callable[[int, int], None]
_KNOWN = re.compile(
    r"gradstore\.json|catalog\.(duckdb|lock)|sketches\.lock|segments/r[0-9]+/lock"
    rf"|{re.escape(erasures.KEY)}|keys/(r[0-9]+/[0-9]+|receipts/[0-9]+\.safetensors)"
    rf"|{catalog.ERASING}|published/catalog-[0-9]+\.duckdb({re.escape(SEAL)})?|quarantine/.*"
)


def verify(root: Path, progress: Progress = lambda done, total: None) -> list[Finding]:
    """Check everything in a store; it is sound if no finding is damage.

    The catalog is checked under its lock, the segments, which do not change, while others write.
    Raises :class:`StoreMissing`, :class:`StoreTooNew`, :class:`StoreBusy` if the catalog stays
    locked, or :class:`EncryptionError` without the master key.
    """
    with ExitStack() as locked:
        with suppress(StoreUnwritable):  # then nobody else can write it either
            doing = "writing the catalog of"
            path = root / "catalog.lock"
            if path.parent.is_dir():
                locked.enter_context(catalog.lock(path, catalog.LOCK_SECONDS, doing))
        return list(examine(root, progress, locked.close))


def examine(
    root: Path,
    progress: Progress = lambda done, total: None,
    unlock: Callable[[], None] = lambda: None,
) -> Iterator[Finding]:
    """The findings of :func:`verify`, for who holds the catalog's lock; ``unlock`` lets it go."""
    model, findings = _description(root)
    yield from findings
    if keys.is_encrypted(root):
        if any(finding.damage for finding in findings):
            return  # it says which key is the right one
        keys.secret_of(root)  # else all of it would look damaged
    yield from _copies(root)
    connection, findings = _readable(root)
    yield from findings
    paths, entered = [path.relative_to(root).as_posix() for path in paths_of(root)], set[str]()
    if connection is not None:
        entered = {path for (path,) in connection.execute("SELECT path FROM segments").fetchall()}
    unlock()
    elsewhere = None
    with suppress(StoreDamaged, StoreMissing):  # of the description, which is told already
        elsewhere = remote.of(root)
    for path in sorted(entered - set(paths)):
        ids = () if connection is None else compare.ids_of(connection, path)
        yield segments.missing(root, path, ids)
    gone = set() if connection is None else compare.replaced(connection)
    for done, path in enumerate(paths):
        progress(done, len(paths))
        if path in gone:
            what = "left of a segment whose place another took: the next command removes it"
            yield Finding(path, what, damage=False)
            continue
        rows, there = (connection if path in entered else None), elsewhere
        if connection is not None and rows is None and elsewhere and not elsewhere.has(root / path):
            there = None  # it is not sent yet
        yield from segments.check(root, path, model, rows, there)
        if connection is not None and path not in entered:
            yield Finding(path, "not in the catalog yet: the next command enters it", damage=False)
    progress(len(paths), len(paths))
    if elsewhere is not None:
        try:
            elsewhere.check_ours()
        except StoreDamaged as error:
            yield Finding(format.NAME, str(error))
        for path, whole in elsewhere.unknown():
            yield Finding(path, f"at {elsewhere.url}: is there, and not in the store", whole)
    if keys.is_encrypted(root):
        for file, said in keys.unreadable(root, paths):
            what = f"serves backups alone, and is damaged: {said}"
            yield Finding(file.relative_to(root).as_posix(), what, damage=False)
    yield from segments.sketches(root)
    known = set[str]()
    if connection is not None:
        yield from compare.dangling(connection, Finding)
        yield from _receipts(root, connection, known)
        yield from _audit(connection)
        yield from _key(root, connection)
        connection.close()
    yield from _strays(root, known, receipts=connection is not None)


# -- the description -------------------------------------------------------------------------


def _description(root: Path) -> tuple[format.ModelIdentity | None, list[Finding]]:
    name = format.NAME
    try:
        stated = format.load(root)
        said = read_json(root / name, format.MOST_BYTES)
    except StoreMissing:
        if not (root / "segments").is_dir():
            raise
        return None, [Finding(name, "is gone")]
    except StoreTooNew:
        raise
    except (StoreError, OSError, ValueError) as error:
        return None, [Finding(name, str(error))]
    if "digest" not in said:
        older = "has no digest of itself: written by an older release"
        return stated.model, [Finding(name, older, damage=False)]
    if said["digest"] != format.digest_of(said):
        return stated.model, [Finding(name, "is not what its own digest says")]
    return stated.model, []


# -- the catalog -----------------------------------------------------------------------------


def _copies(root: Path) -> Iterator[Finding]:
    """The snapshots against their digests, and the catalog against its newest copy."""
    snapshots, newest = catalog.snapshots_of(root), None
    for _, path in snapshots:
        name = path.relative_to(root).as_posix()
        try:
            newest, found = sealed(path), sha256_of(unlinked(path, root))
        except (StoreDamaged, OSError) as error:
            newest = None
            yield Finding(f"{name}{SEAL}", str(error))
            continue
        if newest is None:
            newest = found
            yield Finding(name, "has no digest: published by an older release", damage=False)
        elif newest != found:
            yield Finding(name, f"is not what {name}{SEAL} says")
    file = root / catalog.NAME
    if os.path.islink(file):
        yield Finding(catalog.NAME, "is a symbolic link")
    elif not file.exists():
        if snapshots or paths_of(root):
            yield Finding(catalog.NAME, "is gone")
    elif not snapshots:
        yield Finding("published", "holds no snapshot of the catalog")
    elif newest not in (None, sha256_of(file)):
        yield Finding(
            catalog.NAME,
            f"is not what {name} is a copy of: it is damaged, or a command was killed before it "
            "published its work, which the next one does",
        )
    if (root / f"{catalog.NAME}.wal").exists():
        yield Finding(
            f"{catalog.NAME}.wal", "left by a killed command: the next one enters it", damage=False
        )


def _readable(root: Path) -> tuple[catalog.Connection | None, list[Finding]]:
    """The newest snapshot, if every table of it can be read to the end."""
    snapshots = catalog.snapshots_of(root)
    if not snapshots:
        return None, []
    path = snapshots[-1][1]
    name = path.relative_to(root).as_posix()
    try:
        connection = database.snapshot(unlinked(path, root))
    except StoreError as error:
        return None, [Finding(name, str(error))]
    try:
        for table in compare.tables_of(connection):
            compare.read(connection, table)
        return connection, []
    except duckdb.Error as error:
        connection.close()
        said = str(error).split("\n")[0]
        return None, [Finding(name, f"cannot be read, so that no row was compared: {said}")]


# -- receipts and strays ---------------------------------------------------------------------


def _receipts(root: Path, connection: catalog.Connection, known: set[str]) -> Iterator[Finding]:
    """The files of every receipt against the digests in the catalog."""
    if "receipts" not in compare.tables_of(connection):
        return
    rows = connection.execute("SELECT request_id, digest, update_digest FROM receipts").fetchall()
    for number, digest, update in rows:
        document, weights, signature = (
            f"receipts/{number:04d}.{ending}" for ending in ("json", "safetensors", "sig")
        )
        known |= {document, signature, signature + SEAL} | ({weights} if update else set())
        try:
            found = read_json(unlinked(root / document, root), MOST_BYTES)
            if sha256(canonical(found)).hexdigest() != digest:
                yield Finding(document, "is not what the table receipts says")
            elif not _as_written(root / document, found):
                what = "was written anew: its bytes changed, though it still says the same"
                yield Finding(document, what, damage=False)
        except (StoreDamaged, OSError, ValueError) as error:
            yield Finding(document, str(error))
        try:
            if update and sha256_of(unlinked(root / weights, root)) != update:
                yield Finding(weights, "is not what the table receipts says")
        except (StoreDamaged, OSError) as error:
            yield Finding(weights, str(error))
        yield from _signature(root, signature)


def _audit(connection: catalog.Connection) -> Iterator[Finding]:
    if "audit" in compare.tables_of(connection):
        cursor = connection.execute(audit.SELECT)
        rows = [dict(zip(audit.COLUMNS, row, strict=True)) for row in cursor.fetchall()]
        for said in audit.check(rows):
            yield Finding(catalog.NAME, f"the audit chain is broken: {said}")


def _key(root: Path, connection: catalog.Connection) -> Iterator[Finding]:
    hashes = []
    if "erasures" in compare.tables_of(connection):
        hashes = connection.execute("SELECT id_hash FROM erasures").fetchall()
    try:
        erasures.check_key(root, (name for (name,) in hashes))
    except StoreDamaged as error:
        yield Finding(erasures.KEY, str(error))


def _as_written(path: Path, document: Any) -> bool:
    import json

    written = json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n"
    return path.read_bytes() == written


def _signature(root: Path, name: str) -> Iterator[Finding]:
    if not os.path.lexists(root / name):
        return
    try:
        said, found = sealed(root / name), sha256_of(unlinked(root / name, root))
    except (StoreDamaged, OSError) as error:
        yield Finding(f"{name}{SEAL}", str(error))
        return
    if said is None:
        yield Finding(name, "has no digest: signed by an older release", damage=False)
    elif said != found:
        yield Finding(name, f"is not what {name}{SEAL} says")


def _strays(root: Path, known: Iterable[str], receipts: bool) -> Iterator[Finding]:
    """What lies in the store and is no part of it; links are damage, as none is followed."""
    for name in walk(root, root, skip=("segments/r*/[0-9]*", "sketches/r*/[0-9]*")):
        if os.path.islink(root / name):
            yield Finding(name, "is a symbolic link, which a store does not follow")
        elif "/.tmp-" in f"/{name}":
            yield Finding(name, "unfinished: being written, or left by a killed writer", False)
        elif name.startswith("unfinished/"):
            yield Finding(name, "state of an interrupted request, without a digest", damage=False)
        elif name.startswith("receipts/") and not receipts:
            yield Finding(name, "was not checked: its digest is in the catalog", damage=False)
        elif not _KNOWN.fullmatch(name) and name not in known and not name.endswith(".wal"):
            yield Finding(name, "is no part of a store", damage=False)
