"""Arrays come back bit for bit, any Zarr library agrees, and damage is always named as damage."""

import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import Mock

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128

from gradstore.errors import StoreDamaged, StoreError, StoreUnwritable
from gradstore.store.arrays import (
    CHUNK_BYTES,
    CHUNK_ITEMS,
    CHUNK_ROWS,
    MAPPED_BYTES,
    ZarrArray,
    unpack_rows,
    write_array,
)
from gradstore.store.files import WRITE_BYTES
from gradstore.store.format import PROFILES

DTYPES = ("uint8", "uint16", "int32", "float16", "float32")
Data = np.ndarray[Any, Any]


def around(*edges: int) -> st.SearchStrategy[int]:
    """0, 1 and the neighbourhood of every edge."""
    return st.sampled_from(sorted({0, 1, *(e + n for e in edges for n in (-1, 0, 1))}))


def random_bits(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Data:
    """Any bit pattern of the type, infinities and NaNs of all kinds included."""
    kind = np.dtype(dtype)
    data = np.random.default_rng(seed).bytes(math.prod(shape) * kind.itemsize)
    return np.frombuffer(data, kind).reshape(shape)


vectors = st.tuples(around(CHUNK_ITEMS, 2 * CHUNK_ITEMS))
matrices = st.tuples(around(CHUNK_ROWS, 3 * CHUNK_ROWS), st.sampled_from([1, 3, 70]))
arrays = st.builds(random_bits, vectors | matrices, st.sampled_from(DTYPES), st.integers(0, 3))
profiles = st.sampled_from(PROFILES)


def same(got: Data, want: Data) -> bool:
    """Shape, type and bits (NaNs are not equal to themselves)."""
    return (got.shape, got.dtype, got.tobytes()) == (want.shape, want.dtype, want.tobytes())


@given(arrays, profiles)
def test_round_trip_and_zarr_python_agrees(data: Data, profile: str) -> None:
    with TemporaryDirectory() as folder:
        write_array(Path(folder, "array"), data, profile, {"dtype": "bfloat16"})
        array = ZarrArray(Path(folder, "array"))
        assert array.shape == data.shape
        assert same(array.read(), data)
        judge = zarr.open_array(Path(folder, "array"), mode="r")
        assert same(np.asarray(judge[...]), data)
        assert array.attributes == dict(judge.attrs) == {"dtype": "bfloat16"}


@given(arrays, profiles, st.data())
def test_any_row_range(data: Data, profile: str, draw: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        write_array(Path(folder, "array"), data, profile)
        array = ZarrArray(Path(folder, "array"))
        for _ in range(4):
            start = draw.draw(st.integers(0, len(data)))
            stop = draw.draw(st.integers(start, len(data)))
            assert same(array.rows(start, stop), data[start:stop])
            with pytest.MonkeyPatch.context() as patch:
                for mapped in (1, MAPPED_BYTES):
                    patch.setattr("gradstore.store.arrays.MAPPED_BYTES", mapped)
                    assert same(array.rows(start, stop, copy=False), data[start:stop])
            array.close()


@given(arrays, profiles, st.sampled_from([1, 1000, 1 << 17]))
def test_blocks_are_all_rows_and_no_chunk_comes_twice(data: Data, profile: str, size: int) -> None:
    with TemporaryDirectory() as folder:
        write_array(Path(folder, "array"), data, profile)
        array = ZarrArray(Path(folder, "array"))
        found = list(array.blocks(size))
        assert same(np.concatenate([data[:0], *found]), data)
        chunk = CHUNK_ITEMS if data.ndim == 1 else CHUNK_ROWS
        row = max(1, data[:1].nbytes)
        assert {len(rows) % chunk for rows in found[:-1]} <= {0}
        assert all(rows.nbytes <= max(size, chunk * row) for rows in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("profile", ["packed", "small"])
def test_the_metadata_says_how_blosc_has_shuffled(dtype: str, profile: str, tmp_path: Path) -> None:
    write_array(tmp_path / "array", np.zeros((300, 16), dtype), profile)
    metadata = json.loads((tmp_path / "array/zarr.json").read_text())
    codec = metadata["codecs"][0]["configuration"]["codecs"][1]["configuration"]
    version, _, flags, size = (tmp_path / "array/c.0.0").read_bytes()[:4]
    assert (version, size) == (2, codec["typesize"])
    assert codec["typesize"] == {1: 1, 2: 4, 4: 4}[np.dtype(dtype).itemsize]
    assert flags & 7 == 4  # bits were shuffled, nothing is stored as it was


@given(arrays)
def test_a_raw_shard_begins_with_the_row_major_bytes(data: Data) -> None:
    with TemporaryDirectory() as folder:
        write_array(Path(folder, "array"), data, "raw")
        shard = Path(folder, "array", "c" + ".0" * data.ndim).read_bytes()
        assert shard.startswith(data.tobytes())


def test_a_full_disk_refuses_a_large_array_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random_bits((3 * WRITE_BYTES // 4 + 5, 2), "int32")
    write_array(tmp_path / "fits", data, "raw")
    assert np.array_equal(ZarrArray(tmp_path / "fits").read(), data)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreUnwritable, match="No space left"):
        write_array(tmp_path / "full", data, "raw")
    assert (tmp_path / "full" / "c.0.0").stat().st_size == 0


@pytest.mark.parametrize("profile", PROFILES)
def test_memory_layout_and_byte_order_do_not_matter(tmp_path: Path, profile: str) -> None:
    data = random_bits((300, 8), "int32")
    layouts = {
        "transposed": np.asfortranarray(data),
        "sliced": np.repeat(data, 2, axis=1)[:, ::2],
        "big-endian": data.astype(">i4"),
        "read-only": data,
    }
    for name, laid_out in layouts.items():
        write_array(tmp_path / name, laid_out, profile)
        assert same(ZarrArray(tmp_path / name).read(), data), name
        assert same(np.asarray(zarr.open_array(tmp_path / name, mode="r")[...]), data), name


@pytest.mark.parametrize("profile", PROFILES)
def test_rows_wider_than_a_chunk_may_be(tmp_path: Path, profile: str) -> None:
    data = random_bits((3, CHUNK_BYTES // 4 + 1), "float32")
    write_array(tmp_path / "wide", data, profile)
    array = ZarrArray(tmp_path / "wide")
    assert same(array.rows(1, 2), data[1:2])
    assert same(np.asarray(zarr.open_array(tmp_path / "wide", mode="r")[...]), data)


def test_compressible_data_is_compressed(tmp_path: Path) -> None:
    data = np.zeros((1000, 64), "float32")
    sizes = {}
    for profile in PROFILES:
        written = write_array(tmp_path / profile, data, profile)
        sizes[profile] = sum(facts["bytes"] for facts in written.values())
    assert sizes["packed"] < sizes["raw"] / 20


@pytest.mark.parametrize("profile", PROFILES)
def test_digests_are_those_of_the_files(tmp_path: Path, profile: str) -> None:
    written = write_array(tmp_path / "array", random_bits((200, 5), "float16"), profile)
    assert set(written) == {"zarr.json", "c.0.0"}
    for name, facts in written.items():
        content = (tmp_path / "array" / name).read_bytes()
        assert facts == {"bytes": len(content), "xxh3_128": xxh3_128(content).hexdigest()}


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "array").mkdir()
    (tmp_path / "array" / "zarr.json").write_text("precious")
    with pytest.raises(StoreUnwritable, match=r"cannot write .*zarr\.json: File exists"):
        write_array(tmp_path / "array", random_bits((2, 2), "int32"), "raw")
    assert (tmp_path / "array" / "zarr.json").read_text() == "precious"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What is unpacked or read is noted under ``bytes``; a read returns at most ``limit``."""
    kept, preadv = {"bytes": 0, "limit": 1 << 30}, os.preadv

    def unpacked(piece: memoryview, address: int, size: int, where: object) -> None:
        unpack_rows(piece, address, size, where)
        kept["bytes"] += size

    def into_place(file: int, places: list[memoryview], offset: int) -> int:
        got = preadv(file, [places[0][: kept["limit"]]], offset)
        kept["bytes"] += got
        return got

    monkeypatch.setattr(os, "preadv", into_place)
    monkeypatch.setattr("gradstore.store.arrays.unpack_rows", unpacked)
    return kept


@pytest.mark.parametrize("profile", PROFILES)
def test_one_row_costs_one_chunk_at_most(
    tmp_path: Path, profile: str, reads: dict[str, int]
) -> None:
    data = random_bits((20 * CHUNK_ROWS, 16), "uint16")
    write_array(tmp_path / "array", data, profile)
    array = ZarrArray(tmp_path / "array")
    reads["bytes"] = 0
    assert same(array.rows(5 * CHUNK_ROWS + 7, 5 * CHUNK_ROWS + 8), data[5 * CHUNK_ROWS + 7 :][:1])
    assert 0 < reads["bytes"] < 1.1 * CHUNK_ROWS * 16 * 2


def test_reads_that_return_less_than_was_asked_for(tmp_path: Path, reads: dict[str, int]) -> None:
    """As any above 2 GiB does on Linux: a second moment of a large vocabulary is that big."""
    data, reads["limit"] = random_bits((500, 7), "float32"), 100
    write_array(tmp_path / "array", data, "raw")
    assert same(ZarrArray(tmp_path / "array").read(), data)
    assert reads["bytes"] == data.nbytes


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("left", [0, 40_000])
def test_a_file_that_was_cut_since_it_was_opened(tmp_path: Path, profile: str, left: int) -> None:
    data = random_bits((1 << 17, 2), "uint16")
    write_array(tmp_path / "array", data, profile)
    array = ZarrArray(tmp_path / "array")
    array.close()
    [file] = (tmp_path / "array").glob("c*")
    os.truncate(file, left)
    with pytest.raises(StoreDamaged):
        array.rows(0, len(data), copy=False)


def test_a_file_that_cannot_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_array(tmp_path / "array", random_bits((500, 7), "float32"), "packed")
    array = ZarrArray(tmp_path / "array")
    before = len(os.listdir("/dev/fd"))
    full = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    with monkeypatch.context() as patched:
        patched.setattr("mmap.mmap", Mock(side_effect=full))
        with pytest.raises(StoreError, match="cannot be read now: Cannot allocate memory"):
            array.read()
    assert len(os.listdir("/dev/fd")) == before
    assert len(array.read()) == 500


# -- damage ------------------------------------------------------------------------------------


@pytest.fixture(params=PROFILES)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_array(tmp_path / "array", random_bits((300, 4), "uint16"), request.param)
    return tmp_path / "array"


def read(folder: Path) -> Data:
    return ZarrArray(folder).read()


def test_any_flipped_bit_of_the_index(written: Path) -> None:
    shard = written / "c.0.0"
    good = shard.read_bytes()
    for at in range(len(good) - (16 * 3 + 4), len(good)):
        damaged = bytearray(good)
        damaged[at] ^= 1 << at % 8
        shard.write_bytes(damaged)
        with pytest.raises(StoreDamaged, match="index does not match its checksum"):
            ZarrArray(written)


def test_truncated_at_any_length(written: Path) -> None:
    good = (written / "c.0.0").read_bytes()
    for length in {*range(0, len(good), 37), *range(len(good) - 60, len(good))}:
        (written / "c.0.0").write_bytes(good[:length])
        with pytest.raises(StoreDamaged):
            ZarrArray(written)


def test_flipped_bits_of_the_data_never_raise_anything_else(written: Path) -> None:
    """What decompresses reads as other values: only the manifest's digest can tell."""
    good = (written / "c.0.0").read_bytes()
    for at in range(0, len(good), 11):
        damaged = bytearray(good)
        damaged[at] ^= 1 << at % 8
        (written / "c.0.0").write_bytes(damaged)
        try:
            assert read(written).shape == (300, 4)
        except StoreDamaged:
            pass


@pytest.mark.parametrize("name", ["zarr.json", "c.0.0"])
def test_a_missing_file(written: Path, name: str) -> None:
    (written / name).unlink()
    with pytest.raises(StoreDamaged, match="No such file"):
        ZarrArray(written)


def test_a_file_that_cannot_be_opened_now_is_not_damaged(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match="cannot be read now: Too many open files") as caught:
        ZarrArray(written)
    assert not isinstance(caught.value, StoreDamaged)


def test_a_chunk_that_was_removed(written: Path) -> None:
    """Its index entry says 2⁶⁴−1 twice, as the Zarr specification has it."""
    good = (written / "c.0.0").read_bytes()
    index = np.frombuffer(good[-52:-4], "<u8").reshape(3, 2).copy()
    index[1] = 2**64 - 1
    tail = index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    (written / "c.0.0").write_bytes(good[:-52] + tail)
    if "blosc" not in (written / "zarr.json").read_text():  # its rows are read where they must lie
        with pytest.raises(StoreDamaged, match="chunks are gone"):
            ZarrArray(written)
        return
    assert len(ZarrArray(written).rows(0, CHUNK_ROWS)) == CHUNK_ROWS
    with pytest.raises(StoreDamaged, match=r"chunks for rows 100:130 are gone"):
        ZarrArray(written).rows(100, 130)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 301), (301, 301)])
def test_rows_that_it_does_not_have(written: Path, start: int, stop: int) -> None:
    with pytest.raises(StoreDamaged, match=rf"rows {start}:{stop} of 300"):
        ZarrArray(written).rows(start, stop)


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"\xff\x00", b"[]", b"null", b'{"shape": [3]}', b"[" * 100_000]
)
def test_garbage_for_metadata(written: Path, garbage: bytes) -> None:
    (written / "zarr.json").write_bytes(garbage)
    with pytest.raises(StoreDamaged, match="not a readable array"):
        ZarrArray(written)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in inside:
        yield (*path, key)
        if isinstance(child, dict | list):
            yield from places(child, (*path, key))


def test_any_wrong_value_in_the_metadata_never_raises_anything_else(written: Path) -> None:
    good = (written / "zarr.json").read_text()
    wrong: list[Any] = [None, [], {}, "", "x", "float32", -1, 0, 1e400, math.nan, 10**30, [0], [-1]]
    outcomes = set()
    for path in places(json.loads(good)):
        for value in wrong:
            document = json.loads(good)
            inner = document
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            (written / "zarr.json").write_text(json.dumps(document))
            try:
                read(written)
                outcomes.add("read")  # values that this reader does not use
            except StoreDamaged:
                outcomes.add("damaged")
    assert outcomes == {"read", "damaged"}


def test_a_chunk_that_is_shorter_than_its_place(tmp_path: Path) -> None:
    """Blosc fills what it has: the rest of the place is what memory held before."""
    write_array(tmp_path / "array", random_bits((300, 4), "uint16"), "packed")
    metadata = tmp_path / "array" / "zarr.json"
    metadata.write_text(metadata.read_text().replace('"uint16"', '"float32"'))
    with pytest.raises(StoreDamaged, match="short"):
        read(tmp_path / "array")


@pytest.mark.parametrize("share", [0, 0.5, 2])
def test_a_chunk_that_lies_about_its_size(tmp_path: Path, share: float) -> None:
    write_array(tmp_path / "array", np.zeros((300, 200), "uint16"), "packed")
    shard = tmp_path / "array" / "c.0.0"
    damaged = bytearray(shard.read_bytes())
    size = int.from_bytes(damaged[4:8], "little")
    assert size == CHUNK_ROWS * 200 * 2
    damaged[4:8] = int(share * size).to_bytes(4, "little")
    shard.write_bytes(damaged)
    with pytest.raises(StoreDamaged, match="short|does not decompress"):
        read(tmp_path / "array")
