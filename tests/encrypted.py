"""Encrypted stores: what tests of them share.

PYTEST_DONT_REWRITE: test modules import helpers from here, and name it as their plugin too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from erased import fill

from gradstore import Store
from gradstore.store import format
from gradstore.store.record import Record

KEY = bytes(range(32))


@pytest.fixture
def master_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The master key in the environment."""
    monkeypatch.delenv("GRADSTORE_KEY_FILE", raising=False)
    monkeypatch.setenv("GRADSTORE_KEY", KEY.hex())


@pytest.fixture
def unfilled(master_key: None, tmp_path: Path) -> Store:
    """An empty store that is encrypted."""
    return create(tmp_path / "store")


def create(path: Path, profile: str = "packed") -> Store:
    """An empty store that is encrypted."""
    return Store(path, format.create(path, profile, "bfloat16", master=KEY))


Filled = tuple[Store, dict[str, Record]]


@pytest.fixture(scope="session")
def sealed_once(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """An encrypted store with records, and what they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADSTORE_KEY", KEY.hex())
        store = create(tmp_path_factory.mktemp("sealed") / "store")
        made = fill(store)
        store.refresh()
    return store, made


@pytest.fixture
def filled_sealed(master_key: None, sealed_once: Filled, tmp_path: Path) -> Filled:
    """A copy of that store."""
    return Store.open(shutil.copytree(sealed_once[0].root, tmp_path / "store")), sealed_once[1]


def read_by_id(store: Store, id: str) -> list[Record]:
    """The records of a sample."""
    return list(store.records(list(store.resolve([id]).values()), 1))
