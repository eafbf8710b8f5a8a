"""An erasure that was interrupted, met by those who can only read."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from erased import GOING, IDS, Filled, packed
from mortal import Killed, Mortal

from gradstore import Store
from gradstore.store import catalog
from gradstore.upkeep import erase, recovery
from gradstore.upkeep.repair import repair
from gradstore.upkeep.verify import verify

pytest_plugins = ["erased"]
NOBODY = 65534
assert recovery  # imported before its code is out of nobody's reach


@contextmanager
def read_only(root: Path, kinds: str) -> Iterator[None]:
    """Neither folders nor, if asked, files can be written; who runs the test is not root then."""
    for path in (root, *root.rglob("*")):
        if path.is_dir():
            path.chmod(0o555)
        else:
            path.chmod(0o444 if kinds == "all" else 0o644)
        if os.geteuid() == 0:
            os.chown(path, NOBODY, -1)
    owner = os.geteuid()
    if owner == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(owner)
        for path in (root, *root.rglob("*")):
            path.chmod(0o755)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that another user can reach."""
    path = Path(tempfile.mkdtemp(prefix="gradstore-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@packed
@pytest.mark.parametrize("kinds", ["folders", "all"])
@pytest.mark.parametrize("moment", ["COMMIT", "rmdir"])
def test_a_store_that_cannot_be_written_is_read(
    filled: Filled, folder: Path, moment: str, kinds: str
) -> None:
    store, _ = filled
    root = folder / "store"
    fate = Mortal(store.root, root, moment, 2)
    with pytest.raises(Killed), fate.living():
        erase.erase(store, GOING)
    assert (root / catalog.ERASING).exists()
    with read_only(root, kinds):
        again = Store.open(root)
        stays = again.resolve(id for id in IDS if id not in GOING)
        assert len(list(again.records(list(stays.values()), 1))) == 6
        again.refresh()
    assert (root / catalog.ERASING).exists()
    assert [finding for finding in verify(root) if finding.damage] == []
    assert [a for a in repair(root, dry_run=True) if "set aside" in a.did] == []
    Store.open(root)
    assert not (root / catalog.ERASING).exists()
