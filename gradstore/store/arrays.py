"""One-shard Zarr v3 arrays, written and read at the speed of plain files.

An array chunked only along its rows and kept in a single shard is one file: the chunks one after
another, then an index of 16 bytes a chunk (offset and length) and its CRC-32C. That file is
standard Zarr v3, which any Zarr library opens; these few lines write and read it without one,
because the general pipelines cost several times the CPU of the copy itself.
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import blosc
import google_crc32c
import numpy as np
from blosc.blosc_extension import decompress_ptr
from blosc.blosc_extension import error as BloscError  # noqa: N812

from gradstore.errors import StoreDamaged, StoreError
from gradstore.store.files import HERE, make_folder, read_json, unlinked, write_part

CHUNK_ROWS = 128  # rows of a matrix in one chunk: what reading one record may read too much
CHUNK_BYTES = 1 << 16  # the same bound for wide rows, before compression: smaller ones are slower
CHUNK_ITEMS = 4096  # the same for one-dimensional arrays
MAPPED_BYTES = 1 << 20  # fewer are copied in less time than it takes to map them
METADATA_BYTES = 64 << 20  # zarr.json: attributes may hold a number for each row
EXPANSION = 256  # times its compressed bytes: LZ4 cannot give more
TYPES = ("uint8", "uint16", "int32", "int64", "float16", "float32", "float64", "int8", "int16")
_DAMAGED = (  # what reading wrong metadata can end in: any type, any number, a missing file
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
    FileNotFoundError, IsADirectoryError, NotADirectoryError,
)  # fmt: skip
_MISSING = 2**64 - 1  # the Zarr index entry of a chunk that holds only the fill value
_LZ4: dict[str, Any] = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
_ZSTD: dict[str, Any] = {"cname": "zstd", "clevel": 1, "shuffle": "noshuffle", "blocksize": 0}
blosc.set_nthreads(1)  # in a chunk; instead
blosc.set_releasegil(True)  # several threads take a chunk each


def write_array(
    folder: Path,
    data: np.ndarray,
    profile: str,
    attributes: dict[str, Any] | None = None,
    digest: str = HERE,
) -> dict[str, Any]:
    """Write ``data`` (1-D or 2-D) as a Zarr array at ``folder``; returns its files' digests.

    It is durable once its folder has been through ``sync_tree``.
    ``profile`` is ``packed`` (Blosc: LZ4 after a bit shuffle), ``raw`` (uncompressed: the shard
    starts with exactly the row-major matrix) or ``small`` (as ``packed``, but Zstandard for int8).
    """
    data = np.ascontiguousarray(data).astype(data.dtype.newbyteorder("<"), copy=False)
    chunk = CHUNK_ITEMS
    if data.ndim == 2:
        chunk = max(1, min(CHUNK_ROWS, CHUNK_BYTES // (data.shape[1] * data.itemsize)))
    shard = _shard(data.ndim)
    make_folder(folder)
    metadata = json.dumps(_metadata(data, chunk, profile, attributes or {})).encode()
    pieces = _shard_pieces(data, chunk, profile)
    return {
        "zarr.json": write_part(folder / "zarr.json", [metadata], digest),
        shard: write_part(folder / shard, pieces, digest),
    }


def write_bytes(
    folder: Path, pieces: Iterable[bytes | memoryview], attributes: dict[str, Any]
) -> dict[str, Any]:
    """Write what ``pieces`` yields, one after another, as an uncompressed Zarr array of bytes.

    ``attributes`` may be filled meanwhile. Returns its files' digests, as :func:`write_array` does.
    """
    shard, sizes = _shard(1), list[int]()
    make_folder(folder)

    def with_index() -> Iterator[bytes | memoryview]:
        for piece in pieces:
            sizes.append(len(piece))
            yield piece
        chunk = min(CHUNK_BYTES, max(1, sum(sizes)))  # the last is stored whole
        count = _chunks(sum(sizes), chunk)
        yield bytes(count * chunk - sum(sizes))
        yield _index([chunk] * count)

    written = {shard: write_part(folder / shard, with_index())}
    like = np.broadcast_to(np.uint8(0), sum(sizes))
    chunk = min(CHUNK_BYTES, max(1, sum(sizes)))
    metadata = json.dumps(_metadata(like, chunk, "raw", attributes)).encode()
    return written | {"zarr.json": write_part(folder / "zarr.json", [metadata])}


def _shard_pieces(data: np.ndarray, chunk: int, profile: str) -> Iterator[bytes | memoryview]:
    count, size = _chunks(len(data), chunk), chunk * math.prod(data.shape[1:]) * data.itemsize
    missing = bytes(count * size - data.nbytes)  # a regular grid stores its last chunk whole
    lengths = [size] * count
    if profile == "raw":
        if data.size:
            yield data.data.cast("B")
        yield missing
    else:
        whole = len(data) // chunk
        for number in range(count):
            rows: Any = data[number * chunk : (number + 1) * chunk]
            if number == whole:
                rows = np.frombuffer(rows.tobytes() + missing, data.dtype)
            piece = pack_rows(rows, profile)
            lengths[number] = len(piece)
            yield piece
    yield _index(lengths)


def _index(lengths: Sequence[int]) -> bytes:
    """The end of a shard: where chunks of these lengths lie, and the checksum of that."""
    index = _entries(lengths).tobytes()
    return bytes(index + google_crc32c.value(index).to_bytes(4, "little"))


def _entries(lengths: Sequence[int]) -> np.ndarray:
    """Offset and length of chunks that lie one after another, (chunks, 2)."""
    return np.stack([np.cumsum(lengths) - lengths, lengths], axis=1).astype("<u8")


def pack_rows(rows: np.ndarray, profile: str) -> bytes:
    """Rows as Blosc compresses them in a profile that does."""
    codec = _codec(rows, profile)
    shuffle = getattr(blosc, codec["shuffle"].upper())
    how = codec["typesize"], codec["clevel"], shuffle, codec["cname"]
    packed: bytes = blosc.compress(rows, *how)
    return packed


def unpack_rows(piece: Any, address: int, size: int, where: object) -> None:
    """Decompress what :func:`pack_rows` made into memory that has its very size.

    Raises :class:`StoreDamaged`.
    """
    try:
        if struct.unpack_from("<4x I 4x I", piece) != (size, len(piece)):  # Blosc's header
            raise StoreDamaged(f"{where}: a chunk is short")
        decompress_ptr(piece, address)
    except (BloscError, TypeError, ValueError, MemoryError, struct.error) as error:
        raise StoreDamaged(f"{where} does not decompress: {error}") from error


def address_of(rows: np.ndarray) -> int:
    """Where the memory of an array begins."""
    return int(rows.__array_interface__["data"][0])


class ZarrArray:
    """A one-shard array on disk; ``rows(start, stop)`` reads no more chunks than it must.

    Raises :class:`StoreDamaged` where the files are not what this module writes. All that they say
    of themselves is checked when they are opened: what is read takes memory in proportion to the
    bytes that are there, and lies in them. What is packed is read from mapped memory: nobody may
    write to a file while it is read.
    """

    def __init__(self, folder: Path) -> None:
        try:
            unlinked(folder / "zarr.json", folder.parent)
            metadata = read_json(folder / "zarr.json", METADATA_BYTES)
            self.shape = tuple(map(count, metadata["shape"]))
            if len(self.shape) not in (1, 2) or metadata["data_type"] not in TYPES:
                raise ValueError(f"shape {self.shape}, data_type {metadata['data_type']!r:.40}")
            self.dtype = np.dtype(metadata["data_type"]).newbyteorder("<")
            self.attributes: dict[str, Any] = dict(metadata["attributes"])
            sharding = metadata["codecs"][0]["configuration"]
            self._chunk = count(sharding["chunk_shape"][0])
            inner = [codec["name"] for codec in sharding["codecs"]]
            self.packed = inner == ["bytes", "blosc"]
            if not self.packed and inner != ["bytes"]:
                raise ValueError(f"codecs {inner}")
            separator = metadata["chunk_key_encoding"]["configuration"]["separator"]
            if separator not in (".", "/"):  # "/" in older stores
                raise ValueError(f"separator {separator!r:.40}")
            self._path = unlinked(folder / _shard(len(self.shape), separator), folder)
            self._file = os.open(self._path, os.O_RDONLY)
            self._row = math.prod(self.shape[1:]) * self.dtype.itemsize
            self._index = self._read_index()
            if self.packed:  # read from a map
                os.close(self.__dict__.pop("_file"))
        except _DAMAGED as error:
            raise StoreDamaged(
                f"{folder} is not a readable array ({error}); restore it from a backup"
            ) from error
        except OSError as error:  # not the array's fault: a permission, too many open files
            raise StoreError(f"{folder} cannot be read now: {error.strerror}") from error

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; what was checked of it is kept, and reading opens it again."""
        self.__dict__.pop("_map", None)
        if (file := self.__dict__.pop("_file", None)) is not None:
            os.close(file)

    def __len__(self) -> int:
        return int(self.shape[0])

    def rows(self, start: int, stop: int, *, copy: bool = True, lost: bool = False) -> np.ndarray:
        """Rows ``start`` to ``stop`` as a new (stop − start, …) array.

        Without ``copy`` many rows may be those of the file, mapped into memory.
        None can be ``lost``: what is not sealed has no key.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise StoreDamaged(f"{self._path}: rows {start}:{stop} of {len(self)} were asked for")
        width = self.shape[1:]
        if stop == start:
            return np.empty((0, *width), self.dtype)
        if not self.packed:
            return self._rows_as_they_lie(start, stop, copy)
        first, last = start // self._chunk, (stop - 1) // self._chunk
        index = self._index[first : last + 1].tolist()  # NumPy's own arithmetic takes longer
        begin, end = index[0][0], sum(index[-1])
        if any(_MISSING in entry for entry in index):
            raise StoreDamaged(f"{self._path}: chunks for rows {start}:{stop} are gone")
        lead = first * self._chunk
        stored = memoryview(self._map)[begin:end]
        try:
            held = np.empty(((last - first + 1) * self._chunk, *width), self.dtype)
        except (TypeError, MemoryError) as error:
            raise StoreDamaged(f"{self._path} does not decompress: {error}") from error
        place, size = address_of(held), self._chunk * self._row
        for number, (offset, length) in enumerate(index):
            piece = stored[offset - begin : offset - begin + length]
            unpack_rows(piece, place + number * size, size, self._path)
        return held[start - lead : stop - lead]

    def _rows_as_they_lie(self, start: int, stop: int, copy: bool) -> np.ndarray:
        """Rows of an uncompressed array: those of a matrix, from the first byte of its file."""
        if not copy and (size := (stop - start) * self._row) >= MAPPED_BYTES:
            items = size // self.dtype.itemsize
            try:
                held = np.frombuffer(self._map, self.dtype, items, start * self._row)
            except ValueError as error:  # opened again, and cut
                raise StoreDamaged(f"{self._path}: a chunk is short") from error
            return held.reshape(stop - start, *self.shape[1:])
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)  # as many as the file has
        buffers: Any = [rows]
        offset = start * self._row
        got = os.preadv(self._file, buffers, offset)
        while got < rows.nbytes:  # one system call reads at most 2 GiB
            if not (more := os.preadv(self._file, [rows.data.cast("B")[got:]], offset + got)):
                raise StoreDamaged(f"{self._path}: a chunk is short")
            got += more
        return rows

    def blocks(self, size: int, *, lost: bool = False) -> Iterator[np.ndarray]:
        """All rows, as :meth:`rows` gives them, about ``size`` bytes at a time.

        Chunks come whole, so that none is decompressed twice.
        """
        step = self._chunk * max(1, size // max(1, self._chunk * self._row))
        for start in range(0, len(self), step):
            yield self.rows(start, min(start + step, len(self)), lost=lost)

    def raw_file(self) -> Path:
        """The file of an uncompressed array: it begins with the row-major matrix, to be mapped."""
        size = self.shape[0] * self._row
        if self.packed or os.fstat(self._file).st_size < size:
            raise StoreDamaged(f"{self._path}: its rows do not lie there uncompressed")
        return self._path

    def mapped(self) -> memoryview:
        """The bytes of an uncompressed array, mapped into memory."""
        self.raw_file()
        size = self.shape[0] * self._row
        return memoryview(mmap.mmap(self._file, size, access=mmap.ACCESS_READ) if size else b"")

    def read(self) -> np.ndarray:
        """The whole array."""
        return self.rows(0, len(self))

    @cached_property
    def _file(self) -> int:
        return self._opened()

    @cached_property
    def _map(self) -> mmap.mmap:
        access = mmap.ACCESS_READ if self.packed else mmap.ACCESS_COPY  # PyTorch wants to write
        file = self._opened()
        try:
            return mmap.mmap(file, 0, access=access)
        except ValueError as error:  # it is empty by now
            raise StoreDamaged(f"{self._path}: a chunk is short") from error
        except OSError as error:
            raise StoreError(f"{self._path} cannot be read now: {error.strerror}") from error
        finally:
            os.close(file)  # the map has a descriptor of its own

    def _opened(self) -> int:
        try:
            return os.open(self._path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise StoreDamaged(f"{self._path} is gone; restore it from a backup") from error
        except OSError as error:  # not the array's fault: a permission, too many open files
            raise StoreError(f"{self._path} cannot be read now: {error.strerror}") from error

    def _read_index(self) -> np.ndarray:
        count = _chunks(len(self), self._chunk)
        size = 16 * count + 4
        end = os.fstat(self._file).st_size
        held = count * self._chunk * self._row
        if held > (end * EXPANSION if self.packed else end):
            raise ValueError(f"shape {self.shape} is more than {end} bytes can hold")
        tail = os.pread(self._file, min(size, end), max(end - size, 0))
        if len(tail) != size or google_crc32c.value(tail[:-4]).to_bytes(4, "little") != tail[-4:]:
            raise StoreDamaged(f"{self._path}: the shard's index does not match its checksum")
        index = np.frombuffer(tail[:-4], "<u8").reshape(count, 2)
        offsets, lengths = index[index[:, 0] != _MISSING].T
        stops = offsets + lengths  # one after another, up to the index
        if (lengths > end).any() or (offsets > end).any() or (stops > end - size).any():
            raise ValueError("a chunk lies outside of its file")
        if (offsets[1:] < stops[:-1]).any():
            raise ValueError("chunks overlap")
        if not self.packed and not np.array_equal(
            index, _entries(count * [self._chunk * self._row])
        ):
            raise ValueError("chunks are gone, or not one after another")
        return index


def count(value: Any) -> int:
    """A number that a file gives of rows, columns or bytes. Raises ``ValueError``."""
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError(f"{value!r:.40} is no number of rows or columns")
    return value


def _shard(dimensions: int, separator: str = ".") -> str:
    """The name of the only shard. With "/" each dimension would be one more folder to sync."""
    return separator.join(["c", *["0"] * dimensions])


def _chunks(rows: int, chunk: int) -> int:
    return max(1, -(-rows // chunk))


def _codec(data: np.ndarray, profile: str) -> dict[str, Any]:
    """How Blosc compresses: codes of eight bits have no bytes to shuffle, but entropy to code.

    Numbers of two bytes are shuffled in pairs: that takes as few bytes, and of these widths it is
    the least that Blosc's AVX2 undoes.
    """
    size = data.dtype.itemsize
    codec = _ZSTD if profile == "small" and data.dtype == np.int8 else _LZ4
    return {"typesize": 4 if size == 2 else size, **codec}


def _metadata(
    data: np.ndarray, chunk: int, profile: str, attributes: dict[str, Any]
) -> dict[str, Any]:
    width = list(data.shape[1:])
    to_bytes: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    if data.dtype.itemsize == 1:
        to_bytes = {"name": "bytes"}
    packed = {"name": "blosc", "configuration": _codec(data, profile)}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(data.shape),
        "data_type": data.dtype.name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [_chunks(len(data), chunk) * chunk, *width]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0,
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [chunk, *width],
                    "codecs": [to_bytes] if profile == "raw" else [to_bytes, packed],
                    "index_codecs": [
                        {"name": "bytes", "configuration": {"endian": "little"}},
                        {"name": "crc32c"},
                    ],
                    "index_location": "end",
                },
            }
        ],
        "attributes": attributes,
    }
