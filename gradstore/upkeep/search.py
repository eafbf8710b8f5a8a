"""Searching every byte of a store for what should not be there.

Files are searched as they lie on disk, and again as what they decode to: compressed chunks and
DuckDB's columns hide bytes from a plain search, and so does encryption: what is sealed is opened,
and no key of what was erased may be left. Every byte counts, also of segments that the record was
never in; each is read once, whatever is sought, and all processors search.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import KeyShredded
from gradstore.store import catalog, keys, remote
from gradstore.store.arrays import ZarrArray
from gradstore.store.files import SHARDS
from gradstore.store.keys import Keys
from gradstore.store.sealed import SealedArray, open_array
from gradstore.store.store import Store
from gradstore.upkeep.needles import BLOCK_BYTES, Needles, blocks_of

SHORTEST = 8  # bytes of a pattern; fewer are found anywhere by chance
WORD = 4  # letters from which an id is told from other text
TEXT, HASH = "text", "id_hash"
HASH_BYTES = 8  # a hash is a number of its own: no array of narrower ones decodes to it
Reads = Callable[[Sequence[int]], str]  # what token ids read as
_TELLING = {"D": 0, "H": -1}  # the row of a record that no other has


@dataclass(frozen=True)
class Trace:
    """What a record may have left: ``what`` names it, ``pattern`` is how it lies in memory."""

    what: str
    pattern: bytes


@dataclass
class Search:
    """What was searched, for how many patterns, and where they were found; ``skipped`` were too
    short to tell."""

    files: int = 0
    arrays: int = 0
    bytes: int = 0
    patterns: int = 0
    skipped: list[str] = field(default_factory=list)
    hits: list[str] = field(default_factory=list)


def traces(store: Store, samples: dict[str, int], reads: Reads | None = None) -> list[Trace]:
    """A row of D and one of H of every stored exposure of samples, their token ids, and their text.

    ``reads`` says what token ids read as; without it, texts are not among them.
    Of H the last: in a causal model that of a position tells of what came before it alone, so
    that records which begin alike share the first ones. Of D the first, which tells of the rest.
    """
    found = []
    for run in store.table("SELECT run_id FROM runs ORDER BY run_id"):
        for number in samples.values():
            with suppress(KeyShredded):  # then there is nothing that could be found
                found += _traces(store, number, run["run_id"], reads)
    return list(dict.fromkeys(found))


def search(store: Store, ids: Sequence[str], marks: Sequence[Trace]) -> Search:
    """Look for ids and traces in every file, every array and every text of the store."""
    hashes = [Trace(HASH, catalog.hash_of(id).to_bytes(HASH_BYTES, "little")) for id in ids]
    patterns = [trace for trace in (*marks, *hashes) if len(trace.pattern) >= SHORTEST]
    found = Search(patterns=len(patterns) + len(ids))
    found.skipped = sorted({t.what for t in marks if len(t.pattern) < SHORTEST})
    texts = {t.pattern.decode() for t in patterns if t.what == TEXT}
    hidden = _search_texts(store, ids, sorted(texts), found)
    sought = _Sought(patterns, ids, hidden)
    elsewhere = remote.of(store.root)
    _search_folder(store, store.root, sought, found)
    if elsewhere is not None:
        of_segment = groupby(elsewhere.names(), lambda name: name.split("/")[:3])
        for _, names in of_segment:  # one at a time: together they may be more than the disk holds
            with elsewhere.copied(list(names)) as folder:
                _search_folder(store, folder, sought, found, f"{elsewhere.url}: ")
    if keys.is_encrypted(store.root):
        left = keys.slots_of(store.root, ids)
        found.hits += [f"key: {keys.FOLDER}, of {place}" for place, *_ in left]
    return found


def word(id: str) -> re.Pattern[str]:
    """Finds an id in a text where it stands as a word of its own."""
    return re.compile(rf"(?<!\w){re.escape(id)}(?!\w)")


# -- inside ----------------------------------------------------------------------------------


def _traces(store: Store, number: int, run_id: int, reads: Reads | None) -> list[Trace]:
    found = []
    for record in store.records([number], run_id):
        found.append(Trace("D", _row(record.D, _TELLING["D"])))
        if record.output is not None:
            found.append(Trace("H", _row(record.output.H, _TELLING["H"])))
    if store.format.profile == "small":
        found += _codes(store, [number], run_id)
    for tokens in store.tokens([number], run_id).values():
        for kind in (torch.uint16, torch.int32, torch.int64):
            if kind is not torch.uint16 or tokens.max() < 1 << 16:
                found.append(Trace("tokens", tokens.to(kind).numpy().tobytes()))
        if reads is not None:
            text = reads(tokens.tolist()).strip()
            forms = {text, *(json.dumps(text, ensure_ascii=plain)[1:-1] for plain in (True, False))}
            found += [Trace(TEXT, form.encode()) for form in sorted(forms)]
    return found


def _codes(store: Store, samples: list[int], run_id: int) -> list[Trace]:
    """The same rows of D and H as they lie in a store that keeps them in eight bits."""
    places = store.rows(
        """SELECT segment_id, row_start, row_start + "rows", tail_row IS NOT NULL FROM exposures
           WHERE run_id = ? AND list_contains(?, sample_id)""",
        [run_id, samples],
    )
    return [
        Trace(name, _row(store.segment(segment).stored(name, start, stop), _TELLING[name]))
        for segment, start, stop, both in places
        for name in ("D", "H")[: 1 + both]
    ]


def _row(matrix: Tensor, which: int) -> bytes:
    """One of the rows that are not zero, as it is stored."""
    rows = matrix[(matrix != 0).any(1)]
    return rows[which].contiguous().view(torch.uint8).numpy().tobytes() if len(rows) else b""


def tells(id: str) -> bool:
    """Whether an id can be told from other text that has the same letters."""
    return len(id) >= WORD and not id.isdigit()


def _search_texts(
    store: Store, ids: Sequence[str], texts: Sequence[str], found: Search
) -> set[str]:
    """Search the catalog's texts; returns ids that are part of others, which stay."""
    columns = store.rows(
        """SELECT table_name, column_name FROM duckdb_columns()
           JOIN duckdb_tables() USING (database_name, schema_name, table_name)
           WHERE data_type IN ('VARCHAR', 'JSON', 'VARCHAR[]') ORDER BY ALL"""
    )
    for table, column in columns if texts else ():
        held = f"""SELECT 1 FROM {table}, unnest(?) t(text)
                   WHERE contains("{column}"::VARCHAR, text) LIMIT 1"""
        if store.rows(held, [texts]):
            found.hits.append(f"{TEXT}: catalog, {table}.{column}")
    hidden = set()
    for id in ids:
        longer = [of for (of,) in store.rows("SELECT id FROM samples WHERE contains(id, ?)", [id])]
        if id in longer:
            found.hits.append("id: catalog, samples.id")
        elif longer:
            hidden.add(id)
        for table, column in columns if tells(id) else ():
            named = store.rows(
                f'SELECT DISTINCT "{column}"::VARCHAR FROM {table} '
                f'WHERE contains("{column}"::VARCHAR, ?)',
                [id],
            )
            for (text,) in named if table != "samples" else ():
                for other in longer:
                    text = text.replace(other, "")
                if word(id).search(text):
                    found.hits.append(f"id: catalog, {table}.{column}")
    return hidden


class _Sought:
    """What is sought: traces everywhere, and in files ids, quoted or as they are."""

    def __init__(self, traces: Sequence[Trace], ids: Sequence[str], hidden: set[str]) -> None:
        self._traces = traces
        self._quoted = {id: json.dumps(id).encode() for id in ids}
        self._told = {id: id.encode() for id in ids if tells(id) and id not in hidden}
        patterns = [trace.pattern for trace in traces]
        self._stored = Needles([*patterns, *self._quoted.values(), *self._told.values()])
        self._decoded = {
            wide: Needles(t.pattern for t in traces if wide or t.what != HASH)
            for wide in (True, False)
        }

    def in_file(self, path: Path, name: str) -> list[str]:
        """Says of each that is in a file, which ``name`` tells, what it is and where."""
        held = self._stored.within(blocks_of(path))
        hits = [f"{trace.what}: {name}" for trace in self._traces if trace.pattern in held]
        numbers = any(map(path.match, SHARDS)) or path.suffix == ".safetensors"
        for id, quoted in self._quoted.items():
            named, raw = quoted in held, self._told.get(id, b"")
            if raw in held and not (numbers and len(raw) < SHORTEST):
                named = named or ".duckdb" in path.name  # where texts lie end to end
                named = named or word(id).search(path.read_text(errors="replace")) is not None
            if named:
                hits.append(f"id: {name}")
        return hits

    def in_array(self, array: ZarrArray | SealedArray, name: str) -> list[str]:
        """The same of what an array decodes to."""
        blocks = array.blocks(BLOCK_BYTES, lost=True)
        rows = (block.reshape(-1).view(np.uint8) for block in blocks)
        held = self._decoded[array.dtype.itemsize == HASH_BYTES].within(rows)
        what = sorted({trace.what for trace in self._traces if trace.pattern in held})
        return [f"{each}: {name}, decoded" for each in what]


def _search_folder(store: Store, root: Path, sought: _Sought, found: Search, at: str = "") -> None:
    """Search files and arrays below ``root``, laid out as in the store; it lies ``at`` a URL.

    An array comes right after its file, which is in memory then: a store may be larger than that.
    """
    tasks: list[Callable[[], tuple[int, list[str]]]] = []
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.stat().st_size:
            name = at + path.relative_to(root).as_posix()
            tasks.append(partial(_search_file, path, name, sought))
            found.files += 1
        if path.name == "zarr.json" and _is_array(store, path, root, at):
            name = path.parent.relative_to(root).as_posix()
            tasks.append(partial(_search_array, store, path.parent, name, at, sought))
            found.arrays += 1
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for size, hits in pool.map(lambda task: task(), tasks):
            found.bytes, found.hits = found.bytes + size, found.hits + hits


def _is_array(store: Store, metadata: Path, root: Path, at: str) -> bool:
    """Whether an array can be read beside its ``metadata``."""
    folder = metadata.parent
    if store.format.elsewhere and not remote.is_here(folder.parent, folder.name):
        return False
    place = folder.parent.relative_to(root).as_posix()
    if at and _is_keyless(store, place):
        return False  # nobody can read it; its bytes were searched
    return b'"array"' in metadata.read_bytes()


def _search_file(path: Path, name: str, sought: _Sought) -> tuple[int, list[str]]:
    return path.stat().st_size, sought.in_file(path, name)


def _search_array(
    store: Store, folder: Path, name: str, at: str, sought: _Sought
) -> tuple[int, list[str]]:
    array = _opened(store, folder, name)
    if isinstance(array, ZarrArray) and not array.packed:
        return 0, []  # its file is what it decodes to
    return math.prod(array.shape) * array.dtype.itemsize, sought.in_array(array, at + name)


def _is_keyless(store: Store, place: str) -> bool:
    return keys.is_encrypted(store.root) and not keys.path_of(store.root, place).exists()


def _opened(store: Store, folder: Path, name: str) -> ZarrArray | SealedArray:
    """The array in a folder that has that name in the store, whose keys open it."""
    place = name.rpartition("/")[0]
    if not place.startswith("segments/"):
        return ZarrArray(folder)
    of = Keys.open(store.root, place) if keys.is_encrypted(store.root) else None
    return open_array(folder.parent, folder.name, of)
