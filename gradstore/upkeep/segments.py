"""Are segments and sketches what was written? Files against digests, rows against the catalog."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import duckdb

from gradstore.errors import StoreDamaged, StoreError
from gradstore.store import catalog, format, remote
from gradstore.store.files import SKETCHES, blocks, is_told, read_json, unlinked
from gradstore.store.manifest import MANIFEST, MOST_BYTES, read_manifest, segment_path
from gradstore.store.sealed import open_array
from gradstore.store.sealed_rows import keys_at
from gradstore.upkeep import compare
from gradstore.upkeep.finding import Finding

BLOCK_BYTES = 1 << 25  # decoded at once


def missing(root: Path, path: str, ids: tuple[str, ...]) -> Finding:
    """A segment that the catalog names and that is not there."""
    try:
        segment_path(root, path)
    except StoreDamaged as error:
        return Finding(catalog.NAME, str(error), ids=ids)
    return Finding(path, "is gone", ids=ids)


def check(
    root: Path,
    path: str,
    model: format.ModelIdentity | None,
    connection: catalog.Connection | None,
    elsewhere: remote.Remote | None,
) -> Iterator[Finding]:
    """One segment: its files, its arrays, and its rows of the catalog, where that has it."""
    ids = () if connection is None else compare.ids_of(connection, path)
    try:
        manifest = read_manifest(segment_path(root, path))
    except StoreDamaged as error:
        link = os.path.islink(root / path)
        yield Finding(path if link else f"{path}/{MANIFEST}", str(error), ids=ids)
        return
    ids = ids or tuple(compare.ids_in(manifest))
    digest = manifest["segment"]["digest"]
    if connection is not None and digest != compare.digest_of(connection, path):
        yield Finding(f"{path}/{MANIFEST}", "is not what the catalog's digest says", ids=ids)
        return
    checked = check_files(root, path, manifest, elsewhere)
    damaged = [Finding(f.file, f.what, f.damage, ids) for f in checked]
    yield from damaged
    if not any(finding.damage for finding in damaged):
        for name in compare.arrays_of(manifest):
            if elsewhere is not None and not remote.is_here(root / path, name):
                continue
            try:
                _decode(root / path, name, *compare.shape_of(name, manifest, model))
            except StoreError as error:
                yield Finding(f"{path}/{name}", str(error), ids=ids)
    if connection is not None:
        try:
            for what, hit in compare.rows(connection, path, manifest):
                yield Finding(catalog.NAME, what, ids=hit)
        except (duckdb.Error, LookupError, TypeError, ValueError) as error:
            said = str(error).split("\n")[0]
            yield Finding(f"{path}/{MANIFEST}", f"does not fit the catalog: {said}", ids=ids)


def check_files(
    root: Path, path: str, manifest: Mapping[str, Any], elsewhere: remote.Remote | None = None
) -> Iterator[Finding]:
    """Every file in a folder against its manifest, and none beside, here and elsewhere."""
    listed = {f"{path}/{MANIFEST}"}
    for file, facts in manifest["files"].items():
        name = f"{path}/{file}"
        listed.add(name)
        if elsewhere is not None and remote.is_away(root / path, file):
            continue
        try:
            same = is_told(blocks(unlinked(root / name, root)), facts)
        except (StoreDamaged, OSError) as error:
            yield Finding(name, str(error))
            continue
        if not same:
            yield Finding(name, f"is not what {path}/{MANIFEST} says")
    for other in walk(root, root / path):
        if other not in listed:
            yield Finding(other, f"is not in {path}/{MANIFEST}", damage=False)
    if elsewhere is not None:
        for file, what, damage in elsewhere.check(root / path, manifest):
            yield Finding(file, f"at {elsewhere.url}: {what}", damage)


def check_segment(root: Path, path: str, digest: str | None = None) -> None:
    """Compare a segment with its digests, and its manifest with the catalog's ``digest``.

    Raises :class:`StoreDamaged`.
    """
    if (elsewhere := remote.of(root)) is not None:
        elsewhere.fetch(segment_path(root, path))
    manifest = read_manifest(segment_path(root, path))
    damaged = [finding.file for finding in check_files(root, path, manifest) if finding.damage]
    if digest not in (None, manifest["segment"]["digest"]):
        damaged.append(f"{path}/{MANIFEST}")
    if damaged:
        raise StoreDamaged(
            f"{root / damaged[0]} is not what was written, and would look sound in a new segment; "
            f"restore it from a backup, or set it aside with `gradstore verify -s {root} --repair`"
        )


def _decode(path: Path, name: str, rows: int | None, width: int | None) -> None:
    """Read a whole array. Raises :class:`StoreDamaged` also if it has another shape."""
    array = open_array(path, name, keys_at(path))
    if rows not in (None, len(array)) or width not in (None, *array.shape[1:]):
        raise StoreDamaged(f"{path / name} has the shape {array.shape}, not ({rows}, {width})")
    for _ in array.blocks(BLOCK_BYTES):
        pass


def sketches(root: Path) -> Iterator[Finding]:
    """Sketches against their manifests."""
    for folder in sorted((root / SKETCHES).glob("r[0-9]*/[0-9]*")):
        path = folder.relative_to(root).as_posix()
        try:
            manifest = read_json(unlinked(folder / MANIFEST, root), MOST_BYTES)
            yield from check_files(root, path, manifest)
        except FileNotFoundError:
            yield Finding(path, "has no digests: made by an older release", damage=False)
        except (StoreDamaged, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            yield Finding(f"{path}/{MANIFEST}", str(error))


def walk(root: Path, folder: Path, skip: Iterable[str] = ()) -> Iterator[str]:
    """Files and links below a folder, by their names in the store; a temporary folder is one."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = Path(entry.path).relative_to(root)
        if entry.is_symlink() or not entry.is_dir() or entry.name.startswith(".tmp-"):
            yield name.as_posix()
        elif not any(name.match(pattern) for pattern in skip):
            yield from walk(root, Path(entry.path), skip)
