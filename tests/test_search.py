"""The search of an erasure sees files as they lie and arrays as they decode, each byte once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from records import RUN

from gradstore import Store
from gradstore.store import catalog
from gradstore.store.arrays import write_array
from gradstore.upkeep.needles import BLOCK_BYTES
from gradstore.upkeep.search import HASH, Search, Trace, search

ROW = np.random.default_rng(0).integers(1 << 12, size=768).astype(np.uint16)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store.create(tmp_path / "store")
    store.begin_run(RUN)
    return store


def searched(store: Store) -> Search:
    """A search for one row of D, and an id."""
    return search(store, ["gone-1"], [Trace("D", ROW.tobytes())])


@pytest.mark.parametrize("at", [0, 41, 42, 341, 342, 998, 999])
def test_a_row_is_found_wherever_blocks_and_chunks_end(at: int, store: Store) -> None:
    D = np.random.default_rng(1).integers(1 << 12, size=(1000, 768)).astype(np.uint16)
    assert D.nbytes > 2 * BLOCK_BYTES
    D[at] = ROW
    write_array(store.root / "left" / "D", D, "packed")
    assert searched(store).hits == ["D: left/D, decoded"]


def test_what_is_not_compressed_is_read_once(store: Store) -> None:
    before = searched(store)
    write_array(store.root / "left" / "D", np.stack([ROW, ROW]), "raw")
    found = searched(store)
    added = sum(file.stat().st_size for file in (store.root / "left").rglob("*") if file.is_file())
    assert found.hits == ["D: left/D/c.0.0"]
    assert found.bytes - before.bytes == added
    assert (found.files - before.files, found.arrays - before.arrays) == (2, 1)


def test_what_arrays_decode_to_is_counted(store: Store) -> None:
    before = searched(store)
    write_array(store.root / "left" / "D", np.zeros((500, 768), np.uint16), "packed")
    found = searched(store)
    files = sum(file.stat().st_size for file in (store.root / "left").rglob("*") if file.is_file())
    assert found.bytes - before.bytes == files + 500 * 768 * 2
    assert found.hits == before.hits == []


def test_a_hash_is_found_among_numbers_as_wide(store: Store) -> None:
    order = np.arange(5000)
    order[4321] = np.uint64(catalog.hash_of("gone-1")).astype(np.int64)
    write_array(store.root / "left" / "order", order, "packed")
    assert searched(store).hits == [f"{HASH}: left/order, decoded"]


def test_an_id_is_found_across_the_ends_of_blocks(store: Store) -> None:
    for name, text in {
        "quoted": '"gone-1"',
        "a-word": "of gone-1.",
        "a-part": "gone-10",
        "another": "begone-1",
    }.items():
        (store.root / name).write_bytes(b" " * (BLOCK_BYTES - 4) + text.encode() + b" " * 10)
    assert searched(store).hits == ["id: a-word", "id: quoted"]
