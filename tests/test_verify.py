"""Whatever flips is found, and named; what can be repaired is, and what is lost is said."""

import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from receipted import flip
from records import RUN, assert_all_equal, record, records, tail
from tiny import run, run_json

from gradstore import Store
from gradstore.errors import StoreMissing, StoreUnwritable
from gradstore.store import ModelIdentity, catalog, files
from gradstore.store.files import seal, sha256_of
from gradstore.store.manifest import MANIFEST
from gradstore.store.writer import SegmentWriter
from gradstore.upkeep.finding import Finding
from gradstore.upkeep.repair import Action, repair
from gradstore.upkeep.verify import verify

TAIL = tail()
MODEL = ModelIdentity("Tiny", 500, 16, 16, 8, tied=True)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with all kinds of files: two segments, held-out samples, a request, a receipt."""
    store = Store.create(tmp_path_factory.mktemp("sound") / "store", dtype="float32")
    store.bind(MODEL, "here")
    into = SegmentWriter(store, lambda: store.begin_run(RUN))
    for ids in ("ab", "cd"):
        into.put(records(*ids, tail=TAIL))
        into.flush()
    losses: dict[str, list[Any]] = {"id": ["h"], "epoch": [0], "step": [0], "loss": [2.5]}
    held_out: dict[str, list[Any]] = {"id": ["h"], "token_start": [0], "tokens": [4]}
    into.put_state("holdout", {"tokens": record("h", rows=3).tokens}, {"holdout": held_out})
    into.put_state("holdout", {}, {"holdout_losses": losses})
    into.close()
    receive(store)
    return store.root


def receive(store: Store) -> None:
    """A receipt, its update and a signature, as far as the store knows of them."""
    folder = store.root / "receipts"
    folder.mkdir()
    (folder / "0001.json").write_text(json.dumps({"request": 1}, indent=1) + "\n")
    (folder / "0001.safetensors").write_bytes(bytes(40))
    (folder / "0001.sig").write_text("ab" * 64 + "\n")
    seal(folder / "0001.sig", sha256_of(folder / "0001.sig"))
    digest = sha256(b'{"request":1}').hexdigest()
    update = sha256(bytes(40)).hexdigest()
    with store.transaction() as connection:
        connection.execute("INSERT INTO receipts VALUES (1, ?, ?)", [digest, update])
        connection.execute(
            "INSERT INTO scores (request_id, sample_id, role, metric, before, after) "
            "VALUES (1, 3, 'forget', 'loss', 1, 2)"
        )


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "store")


def damage(root: Path) -> list[Finding]:
    return [finding for finding in verify(root) if finding.damage]


def files_of(root: Path) -> list[Path]:
    """Those that say something: locks do not."""
    found = sorted(path for path in root.rglob("*") if path.is_file())
    return [path for path in found if path.name not in ("lock", "catalog.lock")]


def test_a_sound_store(sound: Path) -> None:
    assert verify(sound) == []
    assert run_json("verify", "-s", sound) == []
    assert "the store is sound" in run("verify", "-s", sound).stderr


@settings(max_examples=15)
@given(data=st.data())
def test_any_flipped_bit_is_found_and_its_file_named(sound: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(files_of(sound)))
    bit = data.draw(st.integers(0, 8 * path.stat().st_size - 1))
    was, times = path.read_bytes(), path.stat()
    flipped = bytearray(was)
    flipped[bit // 8] ^= 1 << bit % 8
    try:
        path.write_bytes(flipped)
        found = damage(sound)
        name = path.relative_to(sound).as_posix()
        assert any(name in (f.file, f"{f.file}.sha256") for f in found), (name, bit, found)
    finally:
        path.write_bytes(was)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_ids_are_named_and_the_exit_code_says_damage(copy: Path) -> None:
    flip(copy / "segments/r0/000002/D/c.0.0", 5)
    [found] = run_json("verify", "-s", copy, code=3)
    assert found["ids"] == ["c", "d"]
    assert found["file"] == "segments/r0/000002/D/c.0.0"
    assert "1 damaged" in run("verify", "-s", copy, "--csv", code=3).stderr


def test_what_lies_around_is_told_but_is_no_damage(copy: Path) -> None:
    (copy / "segments/r0/.tmp-000009").mkdir()
    (copy / "notes.txt").write_text("mine")
    (copy / "segments/r0/000001/more").write_text("x")
    shutil.copytree(copy / "segments/r0/000001", copy / "segments/r1/000001")
    found = verify(copy)
    assert {f.file for f in found} == {
        "segments/r0/.tmp-000009", "notes.txt", "segments/r0/000001/more",
        "segments/r1/000001/more", "segments/r1/000001",
    }  # fmt: skip
    assert not any(f.damage for f in found)


def test_a_store_of_an_older_release_is_sound(copy: Path) -> None:
    stated = json.loads((copy / "gradstore.json").read_text())
    del stated["digest"]
    (copy / "gradstore.json").write_text(json.dumps(stated))
    for path in copy.rglob("*.sha256"):
        path.unlink()
    found = verify(copy)
    assert not any(f.damage for f in found)
    assert {f.what.split(":")[1] for f in found} >= {" written by an older release"}
    assert Store.open(copy).rows("SELECT count(*) FROM exposures") == [(4,)]


@pytest.mark.parametrize(
    ("sql", "ids"),
    [
        ("UPDATE exposures SET row_start = row_start + 1 WHERE sample_id = 1", ("a",)),
        ('UPDATE exposures SET "rows" = 99 WHERE sample_id = 2', ("b",)),
        ("DELETE FROM exposures WHERE sample_id = 3", ("c",)),
        ("DELETE FROM holdout_losses", ("h",)),
        ("UPDATE segments SET records = 3 WHERE segment_id = 1", ()),
        ("INSERT INTO samples SELECT * FROM samples WHERE sample_id = 1", ("a",)),
    ],
)
def test_rows_that_are_not_those_of_the_segment(copy: Path, sql: str, ids: tuple[str]) -> None:
    with catalog.transaction(copy) as connection:
        connection.execute(sql)
    found = damage(copy)
    assert {f.file for f in found} == {"catalog.duckdb"}
    assert {id for f in found for id in f.ids} == set(ids)
    if "UPDATE" in sql:
        repair(copy)
        assert damage(copy) == []


class Full:
    """Opens files of which writes fail once so many were made."""

    def __init__(self, writes: int, code: int) -> None:
        self.left, self.code = writes, code

    def __call__(self, path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        return self.Limited(self, path, mode) if "x" in mode else open(path, mode, *rest, **options)

    class Limited(io.FileIO):
        def __init__(self, disk: "Full", path: Any, mode: str) -> None:
            super().__init__(path, mode)
            self.disk = disk

        def write(self, data: Any) -> int:
            self.disk.left -= 1
            if self.disk.left < 0:
                super().write(memoryview(data)[: len(data) // 2])
                raise OSError(self.disk.code, os.strerror(self.disk.code))
            return super().write(data)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("writes", [0, 9, 24])
def test_a_disk_that_refuses_a_write_leaves_a_sound_store(
    copy: Path, writes: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", Full(writes, code), raising=False)
        store = Store.open(copy)
        into = SegmentWriter(store, store.run())
        into.put(records("e", "f", tail=TAIL))
        with pytest.raises(StoreUnwritable, match=os.strerror(code)):
            into.close()
    with Store.open(copy) as again:
        found = [one.exposure.id for one in again.records(range(1, 8), 1)]
    assert found in (list("abcd"), list("abcdef"))
    assert damage(copy) == []


# -- repair --------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def unlink(path: Path) -> None:
    path.unlink()


def everything(root: Path) -> list[Any]:
    with Store.open(root) as store:
        tables = ("samples", "runs", "exposures", "holdout", "holdout_losses", "scores", "receipts")
        return [store.rows(f"FROM {table}") for table in tables]


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("catalog.duckdb", unlink),
        ("catalog.duckdb", truncate),
        ("catalog.duckdb", flip),
        ("published", unlink),
    ],
)
def test_a_catalog_or_snapshot_that_is_harmed(
    copy: Path, name: str, harm: Callable[[Path], None]
) -> None:
    before = everything(copy)
    path = copy / name
    harm(path if path.is_file() else catalog.snapshots_of(copy)[-1][1])
    found = damage(copy)
    assert found
    planned = repair(copy, dry_run=True)
    assert damage(copy) == found
    assert not (copy / "quarantine").exists()
    assert repair(copy) == planned
    assert damage(copy) == []
    assert everything(copy) == before


def test_no_catalog_and_no_snapshot(copy: Path) -> None:
    before = everything(copy)
    for path in [copy / "catalog.duckdb", *copy.glob("published/*")]:
        path.unlink()
    said = [action.did for action in repair(copy)]
    assert "made anew from 4 segments and nothing else: requests and scores, if" in said[0]
    assert [f.file for f in damage(copy)] == []
    after = everything(copy)
    for rows, kept in zip(before[2:5], after[2:5], strict=True):
        assert rows == kept
    assert after[5:] == [[], []]
    with Store.open(copy) as store:
        assert_all_equal(list(store.records([1, 2, 3, 4], 1)), records(*"abcd", tail=TAIL))


def test_every_copy_is_harmed_in_another_place(copy: Path) -> None:
    """Tables are taken from wherever they can still be read."""
    for path in [copy / "catalog.duckdb", *copy.glob("published/*.duckdb")]:
        truncate(path)
    said = repair(copy)
    assert damage(copy) == []
    assert any("nothing else" in action.did or "catalog" in action.did for action in said)
    assert (copy / "quarantine/catalog.duckdb").exists()


@pytest.mark.parametrize("file", ["D/c.0.0", MANIFEST, "tokens/zarr.json"])
def test_a_damaged_segment_is_set_aside(copy: Path, file: str) -> None:
    path = copy / "segments/r0/000001" / file
    path.write_bytes(b"{" + path.read_bytes()[1:-1])
    before = everything(copy)
    planned = repair(copy, dry_run=True)
    [aside] = [a for a in planned if a.file == "segments/r0/000001"]
    assert aside == Action("segments/r0/000001", "set aside", ("a", "b"))
    rows = run_json("verify", "-s", copy, "--repair")  # it checks again: exit code 0
    assert [row["did"] for row in rows] == [action.did for action in planned]
    assert (copy / "quarantine/segments/r0/000001" / file).exists()
    after = everything(copy)
    assert after[0] == before[0], "samples keep their numbers"
    assert after[5:] == before[5:]
    with Store.open(copy) as store:
        assert_all_equal(list(store.records([1, 2, 3, 4], 1)), records(*"cd", tail=TAIL))


def test_what_cannot_be_repaired_is_said(copy: Path) -> None:
    flip(copy / "receipts/0001.safetensors")
    [left] = repair(copy)
    assert left.file == "receipts/0001.safetensors"
    assert left.did.startswith("left as it is")
    assert run("verify", "-s", copy, "--repair", code=3).stderr.count("still damaged") == 1


def test_temporaries_of_a_living_writer_stay(copy: Path) -> None:
    for rank in ("r0", "r1"):
        (copy / "segments" / rank).mkdir(exist_ok=True)
        (copy / "segments" / rank / ".tmp-000009").mkdir()
    with catalog.lock(copy / "segments/r0/lock", 0, "ingesting into"):
        did = {action.file: action.did for action in repair(copy)}
    assert did["segments/r0"] == "left as it is: a writer is at work there"
    assert did["segments/r1/.tmp-000009"].startswith("removed")
    assert (copy / "segments/r0/.tmp-000009").exists()
    assert not (copy / "segments/r1/.tmp-000009").exists()


def test_usage_and_no_store(tmp_path: Path) -> None:
    assert "give both" in run("verify", "-s", tmp_path, "--dry-run", code=2).stderr
    for check in (verify, repair):
        with pytest.raises(StoreMissing, match="there is no store"):
            check(tmp_path / "nothing")
