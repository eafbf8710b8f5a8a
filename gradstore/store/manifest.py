"""The manifests of finished segments, read without loading an array.

What a manifest or the catalog says of paths, names and counts is checked here, before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradstore.errors import StoreDamaged
from gradstore.store.files import DIGESTS, Facts, digest_in, read_json, sha256_of, unlinked
from gradstore.store.sealed_rows import open_tables

MANIFEST = "manifest.json"
MOST_BYTES = 256 << 20  # of a manifest
TABLES = {  # the catalog's tables that manifests fill, and the columns that find a row in them
    "exposures": ("id", "epoch"),
    "holdout": ("id",),
    "holdout_losses": ("id", "epoch"),
    "moments": ("moment", "layer", "step"),
    "steps": ("step",),
    "layers": ("layer",),
}
Files = Mapping[str, Facts]
_PATH = re.compile(r"segments/r[0-9]+/[0-9]+")
_COUNTS = {
    "run_id", "records", "rows", "bytes", "row_start", "token_start", "tokens", "tail_row", "epoch",
    "step", "scored_tokens", "position_start", "width_in", "width_out",
}  # fmt: skip


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a segment, with its own digest filled in and sealed rows opened.

    Those of a record whose key was shredded are not there. Raises :class:`StoreDamaged`, or
    :class:`EncryptionError` without the master key.
    """
    with _reading(path) as file:
        manifest: dict[str, Any] = read_json(file, MOST_BYTES)
        manifest["tables"] = open_tables(path, manifest["tables"])
        _check(manifest)
        manifest["segment"]["digest"] = sha256_of(file)
    return manifest


def files_of(path: Path) -> Files:
    """The files of a segment, with their sizes and digests: no key is needed for these.

    Raises :class:`StoreDamaged`.
    """
    with _reading(path) as file:
        return _checked(read_json(file, MOST_BYTES)["files"])


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    file = unlinked(path / MANIFEST, path.parent)
    try:
        yield file
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StoreDamaged(f"{file} is damaged ({error}); restore it from a backup") from error


def segment_paths(root: Path) -> list[Path]:
    """All finished segments below ``root``, oldest first within a rank."""
    found = sorted((root / "segments").glob("r[0-9]*/[0-9]*"))
    return [path for path in found if _PATH.fullmatch(path.relative_to(root).as_posix())]


def replaces(path: Path) -> list[str]:
    """Names, below the store, of the segments whose place the one at ``path`` has taken."""
    return list(read_manifest(path)["segment"].get("replaces", []))


def in_order(root: Path, paths: Iterable[Path]) -> list[str]:
    """Names of segments but for those that others replace, which come where those came.

    Of an epoch that was met twice the first record counts: writing a segment again changes nothing.
    """
    older = {path.relative_to(root).as_posix(): replaces(path) for path in paths}
    gone = {name for names in older.values() for name in names}
    return sorted(older.keys() - gone, key=lambda name: min([name, *older[name]]))


def segment_path(root: Path, name: object) -> Path:
    """Where the segment lies that the catalog calls ``name``: below ``segments``, nowhere else."""
    if not isinstance(name, str) or not _PATH.fullmatch(name):
        raise StoreDamaged(
            f"the catalog of {root} has a segment at {name!r:.80}, where none can be; expected "
            "segments/r<rank>/<number>. See `gradstore verify`."
        )
    return unlinked(root / name, root)


def is_name(name: str) -> bool:
    """Whether a segment can have this name in a catalog."""
    return _PATH.fullmatch(name) is not None


def _check(manifest: Mapping[str, Any]) -> None:
    """Refuse what no segment's manifest says, before any of it becomes SQL or a path."""
    run, segment, tables = manifest["run"], manifest["segment"], manifest["tables"]
    if segment["run_id"] != run["run_id"]:
        raise ValueError(f"run {run['run_id']!r:.40} in a segment of {segment['run_id']!r:.40}")
    for name, value in [*run.items(), *segment.items()]:
        if name != "replaces":
            _check_value(name, value)
    for path in segment.get("replaces", []):
        if not _PATH.fullmatch(path):
            raise ValueError(f"a segment at {path!r:.80}")
    for table, columns in tables.items():
        if table not in TABLES:
            raise ValueError(f"no table {table!r:.40}")
        if not columns or len({len(column) for column in columns.values()}) != 1:
            raise ValueError(f"columns of {table} differ in length")
        for name, column in columns.items():
            if type(column) is not list:
                raise ValueError(f"{table}.{name} is no list")
            for value in column:
                _check_value(f"{table}.{name}", value)
    _checked(manifest["files"])


def _checked(files: Files) -> Files:
    for file, facts in files.items():
        parts = file.split("/")
        if {"", ".", ".."} & set(parts) or "\0" in file:
            raise ValueError(f"a file at {file!r:.80}")
        _check_value("bytes", facts["bytes"])
        name, digest = digest_in(facts)
        if not re.fullmatch("[0-9a-f]+", digest) or len(digest) != 2 * DIGESTS[name]().digest_size:
            raise ValueError(f"the {name} of {file!r:.80} is {digest!r:.80}")
    return files


def _check_value(name: str, value: object) -> None:
    """Counts are whole numbers from 0; nothing is a list or an object."""
    if name.rpartition(".")[2] in _COUNTS and value is not None:
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise ValueError(f"{name} is {value!r:.40}")
    elif (name.endswith(".id") and type(value) is not str) or not isinstance(
        value, str | int | float | None
    ):
        raise ValueError(f"{name} is {value!r:.40}")
