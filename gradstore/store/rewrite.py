"""Rewriting a segment: what is to stay is written to a new one, which takes the old one's place.

A segment never changes. The new one says in its manifest what it replaces, so that the rename that
makes it durable and the transaction that makes it visible are the same as for any other, and
recovery after a crash needs nothing more. Values are carried over to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradstore.store.manifest import read_manifest
from gradstore.store.segment import SegmentReader, narrow, write_segment

KINDS = ("gradients", "holdout", "order")  # those that hold or name samples
EMPTY = "empty"  # the kind of a segment that holds nothing of what it replaces
Rows = Mapping[str, Any]
Span = tuple[int, int]


def rewrite(root: Path, path: Path, keep: Callable[[Rows], bool], profile: str) -> Path:
    """Write the rows of a segment at ``path`` that ``keep`` wants to a new one; returns its path.

    ``keep`` gets each row of the manifest's tables that names a sample (``id``; an exposure has its
    ``epoch``, ... too), and each entry of an order as ``{"id_hash": ...}``; of an order, 0 is put
    in place of what is not kept, for the others' places tell how they were met. Rows of a tail
    array that no kept exposure uses go; one that others share stays. It is durable on return, and
    visible when :func:`gradstore.store.catalog.commit_segment` has entered its manifest. The caller
    holds the lock of the rank that wrote it. Raises :class:`StoreDamaged`, :class:`StoreUnwritable`
    or ``ValueError`` for a kind that is not among ``KINDS``.
    """
    manifest = read_manifest(path)
    kind, tables = manifest["segment"]["kind"], manifest["tables"]
    if kind not in KINDS:
        raise ValueError(f"segments of kind {kind} hold no samples; those of {KINDS} do")
    kept = {name: _kept(columns, keep) for name, columns in tables.items()}
    arrays = _Arrays(path, manifest["files"])
    if kind == "order":
        arrays.changed["order"] = lambda order: _without(order, keep)
    elif "exposures" in tables:
        _pack_exposures(kept["exposures"], arrays)
    elif "holdout" in tables:
        spans = _move(kept["holdout"], "token_start", kept["holdout"]["tokens"])
        arrays.changed["tokens"] = lambda tokens: _take(tokens, spans)
    if not any(len(next(iter(columns.values()))) for columns in kept.values()) and kind != "order":
        kind, kept, arrays = EMPTY, {}, _Arrays(path, {})
    return write_segment(
        path.parent,
        run=manifest["run"],
        kind=kind,
        profile=profile,
        arrays=arrays,
        tables=kept,
        replaces=[*manifest["segment"].get("replaces", []), path.relative_to(root).as_posix()],
    )


class _Arrays(Mapping[str, Tensor]):
    """A segment's arrays, changed, one at a time in memory."""

    def __init__(self, path: Path, files: Mapping[str, Any]) -> None:
        self._reader = SegmentReader(path)
        self._names = sorted({name.split("/")[0] for name in files if name.count("/")})
        self.changed: dict[str, Callable[[Tensor], Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        array = self._reader.stored(name)
        if name in self.changed:
            array = self.changed[name](array)
        return narrow(array) if name in ("tokens", "R_index") else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _kept(columns: Mapping[str, Sequence[Any]], keep: Callable[[Rows], bool]) -> dict[str, Any]:
    if "id" not in columns:
        return {name: list(column) for name, column in columns.items()}
    rows = zip(*columns.values(), strict=True)
    stay = [keep(dict(zip(columns, row, strict=True))) for row in rows]
    return {
        name: [value for value, stays in zip(column, stay, strict=True) if stays]
        for name, column in columns.items()
    }


def _pack_exposures(table: dict[str, Any], arrays: _Arrays) -> None:
    """Close the gaps between records: their places in the table, and their rows in the arrays."""
    rows = _move(table, "row_start", table["rows"])
    tokens = _move(table, "token_start", table["tokens"])
    tails = sorted({row for row in table["tail_row"] if row is not None})
    place = {row: number for number, row in enumerate(tails)}
    table["tail_row"] = [place.get(row) for row in table["tail_row"]]
    for name in arrays:
        arrays.changed[name] = lambda whole: _take(whole, rows)
    arrays.changed["tokens"] = lambda whole: _take(whole, tokens)
    arrays.changed["tail"] = lambda whole: whole[tails]


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
