"""Stores whose segments lie elsewhere: what tests of them share.

PYTEST_DONT_REWRITE: test modules import helpers from here, and name it as their plugin too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from records import RUN, assert_all_equal, records, tail

from gradstore import Store
from gradstore.store.format import Elsewhere
from gradstore.store.writer import SegmentWriter
from gradstore.upkeep.verify import verify

TAIL = tail()
BATCHES = (("ada", "ben"), ("cleo", "dora"), ("emil",))
ALL = [id for batch in BATCHES for id in batch]


@pytest.fixture
def cache_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where workers on this machine keep what they bring."""
    monkeypatch.setenv("GRADSTORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def create(root: Path, url: str, cache_bytes: int = 1 << 30) -> Store:
    """An empty store with a run, its segments at a URL."""
    store = Store.create(root, elsewhere=Elsewhere(url, cache_bytes))
    store.begin_run(RUN)
    return store


def write(store: Store, *batches: tuple[str, ...]) -> None:
    """Write a segment of records for each batch of ids."""
    into = SegmentWriter(store, store.run())
    try:
        for ids in batches:
            into.put(records(*ids, tail=TAIL))
            into.flush()
    finally:
        into.abandon()


@pytest.fixture(scope="session")
def sent_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of three segments, which are at ``far`` too."""
    folder = tmp_path_factory.mktemp("sent")
    write(create(folder / "store", f"file://{folder}/far"), *BATCHES)
    return folder


@pytest.fixture
def sent(sent_once: Path, tmp_path: Path, cache_of_workers: Path) -> Store:
    """A copy of that store, and of what is at ``far``."""
    shutil.copytree(sent_once, tmp_path, dirs_exist_ok=True)
    description = tmp_path / "store" / "gradstore.json"
    description.write_text(description.read_text().replace(str(sent_once), str(tmp_path)))
    store = Store.open(tmp_path / "store")
    store.format.save(store.root)  # with the digest of the other URL
    return store


@pytest.fixture
def far(sent: Store) -> Path:
    """Where the segments of ``sent`` lie."""
    return sent.root.parent / "far"


def shards(folder: Path) -> list[Path]:
    """The files of arrays that are in a store."""
    return list(folder.glob("segments/r*/*/*/c.0*"))


def drop(store: Store) -> None:
    """Forget all arrays that are here."""
    for path in shards(store.root):
        path.unlink()
    store.refresh()


def flip(path: Path) -> None:
    """Change one bit of a file."""
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def damages(store: Store) -> list[tuple[str, str]]:
    """What verifying finds damaged, and how."""
    return [(f.file, f.what) for f in verify(store.root) if f.damage]


def assert_has(store: Store, *ids: str) -> None:
    """These records are in the store, to the bit, and no others."""
    numbers = [n for (n,) in store.rows("SELECT DISTINCT sample_id FROM exposures ORDER BY ALL")]
    assert_all_equal(list(store.records(numbers, 1)), records(*ids, tail=TAIL))
