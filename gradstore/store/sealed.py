"""Sealed arrays: what a segment holds of a record, under that record's own key.

A sealed array is a Zarr array of bytes: messages of AES-256-GCM one after another (12 bytes of
nonce, ciphertext, 16 bytes of tag), each a few rows of one record, packed as the store's profile
packs them. Its attributes say of each message whose key it has, how many rows and how many bytes.
What is authenticated with a message binds it to its store, segment, array and rows, so that none
can stand in another's place.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.errors import StoreDamaged
from gradstore.store.arrays import (
    EXPANSION,
    TYPES,
    ZarrArray,
    address_of,
    count,
    pack_rows,
    unpack_rows,
    write_bytes,
)
from gradstore.store.keys import ORDER, OVERHEAD, SHARED, Keys, is_encrypted, owner
from gradstore.store.sealed_rows import Tables, mismatch, place_of, seal_tables

PIECE_BYTES = 3 << 16  # of rows in a message: its buffers stay in the cache
BUFFER_BYTES = 1 << 23  # written at once
FEWEST_BYTES = 512  # of a record in an array, on average, that are worth compressing
_NAMING = ("exposures", "holdout")  # tables that say where in arrays a sample's rows lie
Span = tuple[int, int]  # a slot, and how many rows it has


class Sealing:
    """What seals one segment, made before it: who owns which rows, and the keys for them."""

    def __init__(self, root: Path, place: str, kind: str, tables: Tables) -> None:
        ids = (id for columns in tables.values() for id in columns.get("id", ()))
        self._slots = {id: slot for slot, id in enumerate(dict.fromkeys(ids))}
        self._tails = [self._owner_of_tail(users) for users in _users(tables)]
        self._tables, self._shared = tables, len(self._slots)
        owners = [*map(owner, self._slots), ORDER if kind == "order" else SHARED]
        self._keys = Keys.create(root, place, owners)

    def _owner_of_tail(self, users: set[str]) -> int | None:
        """A tail that one sample alone has used is that sample's."""
        return self._slots[min(users)] if len(users) == 1 else None

    def write(
        self, folder: Path, name: str, data: np.ndarray, profile: str, attributes: dict[str, Any]
    ) -> dict[str, Any]:
        """As :func:`gradstore.store.arrays.write_array`, sealed."""
        return write_sealed(
            folder, name, data, profile, attributes, self._keys, self._spans(name, len(data))
        )

    def tables(self) -> Tables:
        """The tables as the manifest has them: rows that name a sample are sealed."""
        return seal_tables(self._tables, self._slots, self._keys)

    def _spans(self, name: str, rows: int) -> list[Span]:
        """Whose the rows of an array are, from the first to the last."""
        found = [(self._shared, rows)]
        if name == "tail":
            found = [(self._shared if of is None else of, 1) for of in self._tails]
        for table in _NAMING:
            if (columns := self._tables.get(table)) is not None and name != "tail":
                counts = columns["tokens" if name == "tokens" else "rows"]
                slots = [self._slots[id] for id in columns["id"]]
                found = list(zip(slots, counts, strict=True))
        if sum(count for _, count in found) != rows:
            raise ValueError(f"{name} has {rows} rows, of which the tables do not say whose")
        return found


def sealing_of(path: Path, kind: str, tables: Tables) -> Sealing | None:
    """What seals the segment that is to be at a path; None in a store that is not encrypted."""
    root, place = place_of(path)
    return Sealing(root, place, kind, tables) if is_encrypted(root) else None


def _users(tables: Tables) -> list[set[str]]:
    """The samples that use each row of the tails."""
    columns = tables.get("exposures", {})
    rows: Sequence[int | None] = columns.get("tail_row", ())
    found = [set[str]() for _ in range(1 + max((n for n in rows if n is not None), default=-1))]
    for id, row in zip(columns.get("id", ()), rows, strict=True):
        if row is not None:
            found[row].add(id)
    return found


def write_sealed(
    folder: Path,
    name: str,
    data: np.ndarray,
    profile: str,
    attributes: dict[str, Any],
    keys: Keys,
    spans: Sequence[Span],
) -> dict[str, Any]:
    """Write an array whose rows belong to the owners of ``spans``, one after another."""
    data = np.ascontiguousarray(data).astype(data.dtype.newbyteorder("<"), copy=False)
    packed = profile != "raw" and data.nbytes >= FEWEST_BYTES * len(spans)
    said = _said(name, data.dtype.name, data.shape[1:], packed)
    most = max(1, PIECE_BYTES // max(1, math.prod(data.shape[1:]) * data.itemsize))
    slots, counts, sizes = list[int](), list[int](), list[int]()

    def messages() -> Iterator[memoryview]:
        room = min(BUFFER_BYTES, data.nbytes + OVERHEAD * len(spans))
        held, at, start = memoryview(bytearray(room)), 0, 0
        for slot, rows in spans:
            for stop in [*range(start + most, start + rows, most), start + rows] if rows else ():
                piece: Any = data[start:stop]
                content = pack_rows(piece, profile) if packed else piece.data.cast("B")
                size = len(content) + OVERHEAD
                if at + size > len(held):
                    yield held[:at]
                    held, at = held if size <= len(held) else memoryview(bytearray(size)), 0
                what = f"{said}, {start}:{stop}"
                keys.seal_into(slot, what, content, held[at : at + size])
                slots.append(slot)
                counts.append(stop - start)
                sizes.append(size)
                start, at = stop, at + size
        yield held[:at]

    stated = {
        "data_type": data.dtype.name,
        "row": list(data.shape[1:]),
        "packed": packed,
        "slots": slots,
        "rows": counts,
        "bytes": sizes,
    }
    return write_bytes(folder, messages(), {**attributes, "sealed": stated})


def _said(name: str, data_type: str, row: Sequence[int], packed: bool) -> str:
    """What is authenticated with a message of an array, but for its rows."""
    return f"{name}, {data_type} {list(row)} {'packed' if packed else 'raw'}"


class SealedArray:
    """A sealed array: as a :class:`gradstore.store.arrays.ZarrArray` of what was sealed.

    Raises :class:`StoreDamaged` where a message is not what was sealed at its place, or its key was
    shredded, and :class:`EncryptionError` without the master key.
    """

    def __init__(self, array: ZarrArray, name: str, keys: Keys) -> None:
        self._keys = keys
        try:
            said = array.attributes["sealed"]
            row, packed = [count(n) for n in said["row"]], said["packed"]
            if said["data_type"] not in TYPES or len(row) > 1 or type(packed) is not bool:
                raise ValueError(f"data_type {said['data_type']!r:.40}, {len(row)} dimensions")
            self.dtype = np.dtype(said["data_type"]).newbyteorder("<")
            self._slots, rows, sizes = (
                [count(n) for n in said[column]] for column in ("slots", "rows", "bytes")
            )
            if not len(self._slots) == len(rows) == len(sizes) or sum(sizes) != len(array):
                raise ValueError("its messages are not those of its bytes")
            width = math.prod(row) * self.dtype.itemsize
            if any(n * width > EXPANSION * size for n, size in zip(rows, sizes, strict=True)):
                raise ValueError("its messages cannot hold its rows")
        except (LookupError, TypeError, ValueError) as error:
            raise StoreDamaged(
                f"{keys.place}/{name} is not sealed as it says ({error}); restore it from a backup"
            ) from error
        self._array = array
        self._messages = array.mapped()
        array.close()  # what is mapped stays so
        self._packed, self._said = packed, _said(name, said["data_type"], row, packed)
        self._starts = list(accumulate(rows, initial=0))
        self._places = list(accumulate(sizes, initial=0))
        self.shape = (self._starts[-1], *row)
        self.attributes = {k: v for k, v in array.attributes.items() if k != "sealed"}
        self._parted: tuple[int, np.ndarray] | None = None  # a message that is open, and its rows

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, start: int, stop: int, *, copy: bool = True, lost: bool = False) -> np.ndarray:
        """Rows ``start`` to ``stop`` as a new (stop − start, …) array, ``copy`` or not.

        Those whose key was shredded are zeros where rows may be ``lost``.
        """
        if not 0 <= start <= stop <= len(self):
            raise StoreDamaged(
                f"{self._keys.place}: rows {start}:{stop} of {len(self)} were asked for"
            )
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        first = bisect_right(self._starts, start) - 1
        last = max(first, bisect_left(self._starts, stop))
        longest = max((b - a for a, b in pairwise(self._places[first : last + 1])), default=0)
        plain = np.empty(longest * self._packed, np.uint8).data  # the cache keeps it
        for at in range(first, last):
            begin, end = self._starts[at], self._starts[at + 1]
            low, high = max(begin, start), min(end, stop)
            place = out[low - start : high - start]
            if lost and self._keys.shredded(self._slots[at]):
                place[:] = 0
            elif (low, high) == (begin, end):
                self._open(at, place, plain)
            else:
                place[:] = self._whole(at, plain)[low - begin : high - begin]
        return out

    def blocks(self, size: int, *, lost: bool = False) -> Iterator[np.ndarray]:
        """All rows, as :meth:`rows` gives them, in messages of about ``size`` bytes together."""
        starts, rows = (
            self._starts,
            max(1, size // max(1, math.prod(self.shape[1:]) * self.dtype.itemsize)),
        )
        start = 0
        while start < len(self):
            stop = starts[max(bisect_right(starts, start), bisect_right(starts, start + rows) - 1)]
            yield self.rows(start, stop, lost=lost)
            start = stop

    def read(self) -> np.ndarray:
        """The whole array."""
        return self.rows(0, len(self))

    def close(self) -> None:
        """Let go of the file, and of rows that are open."""
        self.__dict__.pop("_messages", None)
        self._parted = None
        self._array.close()

    def slots(self, starts: Sequence[int]) -> list[int]:
        """The slots of those that own the rows at ``starts``."""
        return [self._slots[bisect_right(self._starts, start) - 1] for start in starts]

    @cached_property
    def _messages(self) -> memoryview:
        return self._array.mapped()

    def _whole(self, at: int, plain: memoryview) -> np.ndarray:
        """All rows of a message of which some are asked for: the next read may want the rest."""
        parted = self._parted  # other threads may read too
        if parted is None or parted[0] != at:
            rows = self._starts[at + 1] - self._starts[at]
            parted = at, np.empty((rows, *self.shape[1:]), self.dtype)
            self._open(at, parted[1], plain)
            self._parted = parted
        return parted[1]

    def _open(self, at: int, rows: np.ndarray, plain: memoryview) -> None:
        """Open one message into its rows, by way of a buffer where it is packed."""
        if not rows.nbytes:
            return
        message = self._messages[self._places[at] : self._places[at + 1]]
        what = f"{self._said}, {self._starts[at]}:{self._starts[at + 1]}"
        slot = self._slots[at]
        if self._packed:
            plain = plain[: max(0, len(message) - OVERHEAD)]
            self._keys.open_into(slot, what, message, plain)
            unpack_rows(plain, address_of(rows), rows.nbytes, self._keys.place)
        else:
            self._keys.open_into(slot, what, message, rows.data.cast("B"))


def open_array(
    path: Path, name: str, keys: Keys | None, called: str | None = None
) -> ZarrArray | SealedArray:
    """An array of the segment at a path: sealed if there are ``keys``, and only then.

    ``called`` is what it was called when it was sealed, if that is not its name. Raises
    :class:`StoreDamaged`: in an encrypted store, nothing that is not sealed was written.
    """
    array = ZarrArray(path / name)
    if ("sealed" in array.attributes) != (keys is not None):
        raise mismatch(path / name, keys)
    return array if keys is None else SealedArray(array, called or name, keys)


def slots_at(path: Path, keys: Keys, starts: Sequence[int]) -> list[int]:
    """The slots of the samples whose rows start there in a segment of gradients."""
    D = open_array(path, "D", keys)  # noqa: N806
    assert isinstance(D, SealedArray)  # since there are keys
    return D.slots(starts)
