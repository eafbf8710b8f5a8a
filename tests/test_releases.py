"""Stores that were committed when they were made: they open, verify, and give what they held."""

from __future__ import annotations

import json
import shutil
import tarfile
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from make_store import contents
from tiny import digests, refused, run, run_json

from gradstore import Store
from gradstore.upkeep.verify import verify

pytest_plugins = ["encrypted"]
DATA = Path(__file__).parent / "data"
VERSIONS = sorted(path.name.split(".")[0] for path in DATA.glob("store-*.json"))


def unpacked(version: str, folder: Path) -> Path:
    with tarfile.open(DATA / f"{version}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "store"


def checked_out(version: str, folder: Path) -> Path:
    """As a tool that knows neither times, nor modes, nor empty folders would copy it."""
    source, target = unpacked(version, folder / "archive"), folder / "store"
    for path in sorted(source.rglob("*"), reverse=True):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.relative_to(source))
    return target


@pytest.fixture(params=product([unpacked, checked_out], VERSIONS))
def kept(request: pytest.FixtureRequest, master_key: None, tmp_path: Path) -> tuple[Path, Any]:
    """A store and what it holds; the key is for those that are encrypted."""
    copied, version = request.param
    return copied(version, tmp_path), json.loads((DATA / f"{version}.json").read_text())


def test_it_opens_and_gives_what_it_held(kept: tuple[Path, Any]) -> None:
    root, said = kept
    assert [finding for finding in verify(root) if finding.damage] == []
    with Store.open(root) as store:
        assert contents(store) == said
    assert [finding for finding in verify(root) if finding.damage] == []


def test_commands_read_it(kept: tuple[Path, Any]) -> None:
    root, said = kept
    store = ("-s", root)
    listed = sorted(row["id"] for row in run_json("list", *store))
    assert listed == sorted(id for id, _ in said["samples"])
    [first] = run_json("show", said["samples"][0][0], *store)["sample"]
    assert first["id"] == said["samples"][0][0]
    count = "SELECT count(*) AS count FROM gradients"
    assert run_json("sql", count, *store) == [{"count": len(said["records"])}]
    assert run_json("runs", *store)[0]["status"] == "finished"
    assert "it was erased on 20" in refused("show", "p-05", *store)
    assert run("audit", *store).stderr.startswith(f"the chain of {len(said['audit'])} holds")
    run("verify", *store)


def test_it_is_made_again_from_its_segments(kept: tuple[Path, Any]) -> None:
    root, said = kept
    for path in (root / "catalog.duckdb", *(root / "published").iterdir()):
        path.unlink()
    before = digests(root / "segments")
    with Store.open(root) as store:
        found = contents(store)
    key = ("id", "epoch")
    assert sorted(found["records"], key=lambda row: [row[k] for k in key]) == sorted(
        said["records"], key=lambda row: [row[k] for k in key]
    )
    assert sorted(found["samples"]) == sorted(said["samples"])
    assert sorted(found["held out"].values()) == sorted(said["held out"].values())
    assert digests(root / "segments") == before
