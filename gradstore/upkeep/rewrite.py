"""Rewriting segments: what is to stay is written to a new one, which takes the old ones' place.

A segment never changes. The new one says in its manifest what it replaces, so that the rename that
makes it durable and the transaction that makes it visible are the same as for any other, and
recovery after a crash needs nothing more. Values are carried over to the bit, but for those that
come into profile ``small`` from another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradstore.errors import StoreDamaged
from gradstore.store import format
from gradstore.store.arrays import METADATA_BYTES
from gradstore.store.files import read_json, unlinked
from gradstore.store.manifest import read_manifest
from gradstore.store.quantize import decode, parts_of
from gradstore.store.segment import SegmentReader, narrow, write_segment

KINDS = ("gradients", "holdout", "order", "moments")
SMALL = "small"  # the profile that keeps values less exactly than they were captured
EMPTY = "empty"  # the kind of a segment that holds nothing of what it replaces
Rows = Mapping[str, Any]
Span = tuple[int, int]


def rewrite(root: Path, paths: Sequence[Path], keep: Callable[[Rows], bool], profile: str) -> Path:
    """Write the rows that ``keep`` wants of segments, one after another, to a new one: its path.

    ``keep`` gets each row of the manifests' tables that names a sample (``id``; an exposure has its
    ``epoch``, ... too), and each entry of an order as ``{"id_hash": ...}``; of an order, 0 is put
    in place of what is not kept, for the others' places tell how they were met. Rows of a tail
    array that no kept exposure uses go; one that others share stays. Into ``small`` factors are
    rounded, out of it they stay as they were rounded. It is durable on return, and
    visible when :func:`gradstore.store.catalog.commit_segment` has entered its manifest. The caller
    holds the lock of the rank that wrote them all. Raises :class:`StoreDamaged`,
    :class:`StoreUnwritable`, or ``ValueError`` for a kind that is not among ``KINDS`` and for
    several segments that are not gradients of one :func:`shape`.
    """
    manifests = [read_manifest(path) for path in paths]
    kind = manifests[0]["segment"]["kind"]
    if kind not in KINDS:
        raise ValueError(f"segments of kind {kind} are not rewritten; those of {KINDS} are")
    if len(paths) > 1 and (kind != "gradients" or len({shape(path) for path in paths}) > 1):
        raise ValueError(f"these are not gradients of one shape: {', '.join(map(str, paths))}")
    small = [manifest["segment"]["profile"] == SMALL for manifest in manifests]
    as_stored = profile != SMALL or all(small)
    sources, tables = [], dict[str, dict[str, list[Any]]]()
    for path, manifest in zip(paths, manifests, strict=True):
        kept = {name: _kept(columns, keep) for name, columns in manifest["tables"].items()}
        source = _Source(path, manifest["files"], decoded=profile != SMALL or not as_stored)
        if kind == "order":
            source.changed["order"] = lambda order: _without(order, keep)
        elif "exposures" in kept:
            _pack_exposures(kept["exposures"], source)
        elif "holdout" in kept:
            _pack_holdout(kept["holdout"], source)
        for name, columns in kept.items():
            _append(tables.setdefault(name, {column: [] for column in columns}), columns)
        sources.append(source)
    if tables and not any(len(next(iter(columns.values()))) for columns in tables.values()):
        kind, tables, sources = EMPTY, {}, []
    return write_segment(
        paths[0].parent,
        run=manifests[0]["run"],
        kind=kind,
        profile=profile,
        arrays=_Arrays(sources),
        tables=tables,
        replaces=_ancestors(root, paths, manifests),
        as_stored=as_stored,
        rounded=(profile != SMALL and any(small)) or any("rounded" in m for m in manifests),
        digest=format.load(root).file_digest,
    )


def shape(path: Path) -> tuple[object, ...]:
    """What segments must have alike to become one: the run, and what their rows are made of."""
    manifest = read_manifest(path)
    return (
        manifest["run"]["run_id"],
        *sorted((name, *columns) for name, columns in manifest["tables"].items()),
        *((name, *_row(path / name)) for name in _arrays_in(manifest["files"])),
    )


def _row(array: Path) -> tuple[object, ...]:
    """What a row of an array is, by its description: its bytes may lie elsewhere."""
    try:
        said = read_json(unlinked(array / "zarr.json", array.parent), METADATA_BYTES)
        held = said["attributes"].get("sealed") or said
        width = held["row"] if "row" in held else held["shape"][1:]
        kind = said["attributes"].get("dtype", held["data_type"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StoreDamaged(f"{array} is not a readable array ({error})") from error
    return (*width, "int32" if kind == "uint16" else kind)  # ids, as wide as the largest wants


def _ancestors(
    root: Path, paths: Sequence[Path], manifests: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The segments' names, and those that they replaced in turn.

    One of those may still lie on disk: what says that it is garbage must not go before it.
    """
    names = [path.relative_to(root).as_posix() for path in paths]
    earlier = [name for m in manifests for name in m["segment"].get("replaces", [])]
    return [*names, *earlier]


class _Source:
    """A segment's arrays, changed; if ``decoded``, factors as they are read, in one array each."""

    def __init__(self, path: Path, files: Mapping[str, Any], decoded: bool) -> None:
        self._reader, self._decoded = SegmentReader(path), decoded
        names = _arrays_in(files)
        parts = {part for name in names for part in parts_of(name)} if decoded else ()
        self.names = [name for name in names if name not in parts]
        self.changed: dict[str, Callable[[Tensor], Tensor]] = {}

    def array(self, name: str) -> Tensor:
        array = self._reader.readable(name)
        if self._decoded and array.dtype is torch.int8:
            array = decode(array, *map(self._reader.readable, parts_of(name)))
        return self.changed[name](array) if name in self.changed else array


class _Arrays(Mapping[str, Tensor]):
    """The arrays of segments, each after its like, one name at a time in memory."""

    def __init__(self, sources: Sequence[_Source]) -> None:
        self._sources = sources

    def __getitem__(self, name: str) -> Tensor:
        array = torch.cat([source.array(name) for source in self._sources])
        return narrow(array) if name in ("tokens", "R_index") else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources[0].names if self._sources else ())

    def __len__(self) -> int:
        return len(list(iter(self)))


def _arrays_in(files: Mapping[str, Any]) -> list[str]:
    return sorted({name.split("/")[0] for name in files if name.count("/")})


def _kept(columns: Mapping[str, Sequence[Any]], keep: Callable[[Rows], bool]) -> dict[str, Any]:
    if "id" not in columns:
        return {name: list(column) for name, column in columns.items()}
    rows = zip(*columns.values(), strict=True)
    stay = [keep(dict(zip(columns, row, strict=True))) for row in rows]
    return {
        name: [value for value, stays in zip(column, stay, strict=True) if stays]
        for name, column in columns.items()
    }


def _pack_exposures(table: dict[str, Any], source: _Source) -> None:
    """Close the gaps between records: their places in the table, and their rows in the arrays."""
    rows = _move(table, "row_start", table["rows"])
    tokens = _move(table, "token_start", table["tokens"])
    tails = sorted({row for row in table["tail_row"] if row is not None})
    place = {row: number for number, row in enumerate(tails)}
    table["tail_row"] = [place.get(row) for row in table["tail_row"]]
    for name in source.names:
        source.changed[name] = lambda whole: _take(whole, rows)
    source.changed["tokens"] = lambda whole: _take(whole, tokens)
    source.changed["tail"] = lambda whole: whole[tails]


def _pack_holdout(table: dict[str, Any], source: _Source) -> None:
    tokens = _move(table, "token_start", table["tokens"])
    source.changed["tokens"] = lambda whole: _take(whole, tokens)


def _append(table: dict[str, list[Any]], columns: Mapping[str, Sequence[Any]]) -> None:
    """Put rows after those of the segments before; their places begin where those end."""
    taken = {}
    if "tail_row" in table:
        tails = [row for row in table["tail_row"] if row is not None]
        taken = {"row_start": sum(table["rows"]), "token_start": sum(table["tokens"])}
        taken["tail_row"] = max(tails, default=-1) + 1
    for name, values in columns.items():
        if first := taken.get(name):
            values = [None if value is None else value + first for value in values]
        table[name] += values


def _move(table: dict[str, Any], start: str, lengths: Sequence[int]) -> list[Span]:
    """Put rows one after another; returns where they were, as (start, stop)."""
    spans = [(at, at + count) for at, count in zip(table[start], lengths, strict=True)]
    table[start] = list(accumulate(lengths, initial=0))[:-1]
    return spans


def _take(whole: Tensor, spans: Sequence[Span]) -> Tensor:
    return torch.cat([whole[start:stop] for start, stop in spans]) if spans else whole[:0]


def _without(order: Tensor, keep: Callable[[Rows], bool]) -> Tensor:
    stays = [keep({"id_hash": key % (1 << 64)}) for key in order.tolist()]
    return torch.where(torch.tensor(stays), order, 0)
