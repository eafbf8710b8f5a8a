"""Sealed rows of manifests, each under the key of the sample that it names; and single files.

Each row of a table that names samples is one message: the JSON list of its values. The names of the
columns stay in clear, and are authenticated with it, as its place is.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradstore.errors import StoreDamaged
from gradstore.store.keys import SHARED, Keys, discard, is_encrypted

Tables = Mapping[str, Mapping[str, Sequence[Any]]]
_FILE = b"gradstore sealed 1"


def place_of(path: Path) -> tuple[Path, str]:
    """The store that a segment lies in, and its name there."""
    root = path.parent.parent.parent
    return root, path.relative_to(root).as_posix()


def keys_at(path: Path) -> Keys | None:
    """The keys of the segment at a path; None in a store that is not encrypted."""
    root, place = place_of(path)
    return Keys.open(root, place) if is_encrypted(root) else None


def seal_tables(tables: Tables, slots: Mapping[str, int], keys: Keys) -> Tables:
    """Tables as a manifest has them; ``slots`` has each sample's."""
    return {
        name: _sealed(name, columns, slots, keys) if "id" in columns else columns
        for name, columns in tables.items()
    }


def open_tables(path: Path, tables: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of the manifest of the segment at a path, with their rows opened.

    Rows whose key was shredded are not there. Raises :class:`StoreDamaged` where rows are sealed in
    a store that is not encrypted, or are not in one that is; ``ValueError``, ``LookupError`` or
    ``TypeError`` where tables are none.
    """
    naming = {name: c for name, c in tables.items() if "id" in c or "sealed" in c}
    if not naming:
        return dict(tables)
    keys = keys_at(path)
    if any(("sealed" in columns) != (keys is not None) for columns in naming.values()):
        raise mismatch(path, keys)
    if keys is None:
        return dict(tables)
    return {**tables, **{name: _opened(name, columns, keys) for name, columns in naming.items()}}


def mismatch(path: Path, keys: Keys | None) -> StoreDamaged:
    """The error for what is sealed in a store without keys, or is not in one with them."""
    what = (
        "is sealed, but its store has no keys"
        if keys is None
        else "is not sealed, as all is in an encrypted store"
    )
    return StoreDamaged(f"{path} {what}; restore it from a backup")


def _sealed(
    name: str, columns: Mapping[str, Sequence[Any]], slots: Mapping[str, int], keys: Keys
) -> dict[str, list[Any]]:
    of, names = [slots[id] for id in columns["id"]], list(columns)
    messages = []
    for number, row in enumerate(zip(*columns.values(), strict=True)):
        text = json.dumps(row, default=str).encode()
        message = keys.seal(of[number], _said(name, number, names), text)
        messages.append(base64.b64encode(message).decode())
    return {"columns": names, "slots": of, "sealed": messages}


def _opened(name: str, columns: Mapping[str, Any], keys: Keys) -> dict[str, list[Any]]:
    names, rows = list(columns["columns"]), []
    for number, (slot, text) in enumerate(zip(columns["slots"], columns["sealed"], strict=True)):
        if not keys.shredded(slot):
            message = memoryview(base64.b64decode(text, validate=True))
            rows.append(json.loads(keys.opened(slot, _said(name, number, names), message)))
    return {column: [row[at] for row in rows] for at, column in enumerate(names)}


def _said(table: str, number: int, names: Sequence[str]) -> str:
    """What is authenticated with a row."""
    return f"table {table}, {number}, {json.dumps(names)}"


# -- single files ------------------------------------------------------------------------------


def seal_file(root: Path, place: str, content: bytes) -> bytes:
    """What to write at a place below an encrypted store, with new keys; else the content itself."""
    if not is_encrypted(root):
        return content
    discard(root, place)
    return _FILE + Keys.create(root, place, [SHARED]).seal(0, "file", content)


def open_file(file: Path) -> bytes:
    """The content of a file one folder below a store, whether it is sealed or not.

    Raises ``OSError``, or :class:`StoreDamaged`.
    """
    held, root = file.read_bytes(), file.parent.parent
    place = file.relative_to(root).as_posix()
    keys = Keys.open(root, place) if is_encrypted(root) else None
    if held.startswith(_FILE) != (keys is not None):
        raise mismatch(file, keys)
    return held if keys is None else bytes(keys.opened(0, "file", memoryview(held)[len(_FILE) :]))
