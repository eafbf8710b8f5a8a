"""Writers are killed at any moment, and what they had acknowledged is there, to the bit."""

import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crash_writer import POINTS
from records import RUN, assert_all_equal, assert_equal, record, records, tail
from victims import Victims, everything, left_behind

from gradstore import Store
from gradstore.errors import StoreUnwritable
from gradstore.store import catalog, database
from gradstore.store.record import Record
from gradstore.store.writer import SegmentWriter
from gradstore.upkeep.verify import verify

ROUNDS = 45  # of kills, every second of two writers
LONGEST = 0.3  # seconds that a writer lives
TAIL = tail()


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Victims, Path]]:
    """The process and the path of its store; tests put a store there."""
    root = tmp_path_factory.mktemp("crash") / "store"
    with Victims(root) as victims:
        yield victims, root


@pytest.fixture
def victims(imported: tuple[Victims, Path]) -> Iterator[tuple[Victims, Store]]:
    running, root = imported
    store = Store.create(root)
    store.begin_run(RUN)
    yield running, store
    store.refresh()
    shutil.rmtree(root)


def unfinished(store: Store) -> list[Path]:
    return [*store.root.rglob(".tmp-*"), *store.root.glob("*.wal")]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kill_at_random_moments(victims: tuple[Victims, Store], seed: int) -> None:
    running, store = victims
    chance = random.Random(seed)
    acknowledged: set[str] = set()
    checked: set[str] = set()
    moments: Counter[str] = Counter()
    longest = LONGEST
    for n in range(ROUNDS):
        writers = {str(rank): f"{n}-r{rank}" for rank in range(1 + n % 2)}
        new = running.run(writers=writers, after=chance.uniform(0.01, longest))
        acknowledged |= new
        longest *= 1.0 if new else 1.05  # a busy machine needs longer
        moments.update(left_behind(store))
        if n % 4 == 3:  # else the next writers are the ones that recover
            found = everything(Store.open(store.root))
            assert acknowledged <= found.keys()
            for id in found.keys() - checked:
                assert_equal(found[id], record(id, tail=TAIL))
            checked |= found.keys()
    for rank in (0, 1):
        SegmentWriter(store, store.run(), rank).close()
    assert unfinished(store) == []
    found = everything(Store.open(store.root))
    assert acknowledged <= found.keys()
    for id, one in found.items():
        assert_equal(one, record(id, tail=TAIL))
    print(f"{ROUNDS} rounds, {len(acknowledged)} acknowledged, {len(found)} found, {moments}")
    assert len(acknowledged) >= 20, "the writers lived too briefly to show anything"
    assert moments["writing a segment"] > 0
    assert moments["not yet visible"] > 0


@pytest.mark.parametrize("point", POINTS)
def test_kill_at_every_step(victims: tuple[Victims, Store], point: str) -> None:
    running, store = victims
    write(store, "before")
    assert running.run(writers={"0": "killed"}, point=point) == set()

    again = Store.open(store.root)
    assert again.is_current()
    found = everything(again)
    ids = list(found)
    assert ids == ["before", *[f"killed-0-{n}" for n in range(len(ids) - 1)]]
    steps = list(POINTS)
    durable = steps.index(point) >= steps.index("after the rename")
    assert (len(ids) > 1) == durable, "the rename is the moment of durability"
    write(again, "after")
    assert unfinished(store) == []
    found = everything(Store.open(store.root))
    assert list(found) == [*ids, "after"]
    for id, one in found.items():
        assert_equal(one, record(id, tail=TAIL))


def write(store: Store, *ids: str) -> None:
    into = SegmentWriter(store, store.run())
    into.put(records(*ids, tail=TAIL))
    into.close()


def test_a_catalog_is_made_in_one_step(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """DuckDB cannot open a file whose creation was interrupted."""
    with monkeypatch.context() as patch:
        patch.setattr(database, "migrate", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.begin_run(RUN)
    assert [path.name for path in unfinished(store)] == [".tmp-catalog.duckdb"]
    assert not (store.root / catalog.NAME).exists()
    (store.root / ".tmp-catalog.duckdb").write_bytes(b"half a header")
    again = Store.open(store.root)
    again.begin_run(RUN)
    write(again, "a")
    assert unfinished(store) == []


def test_the_catalog_can_be_rebuilt_from_the_segments(store: Store) -> None:
    store.begin_run(RUN)
    for ids in ("ba", "dc", "ab"):
        write(store, *ids)
    want, facts = everything(store), store.run()
    store.refresh()
    (store.root / catalog.NAME).unlink()
    shutil.rmtree(store.root / "published")
    (store.root / "published").mkdir()
    rebuilt = Store.open(store.root)
    found = everything(rebuilt)
    assert_all_equal(list(found.values()), list(want.values()))
    assert rebuilt.run() == facts


# -- power ---------------------------------------------------------------------------------------


class Disk:
    """Notes what is fsynced and renamed, in order, by inode."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, Any]] = []
        self.trees: dict[str, dict[Path, tuple[int, int]]] = {}
        fsync, rename = os.fsync, os.replace

        def noting_fsync(file: int) -> None:
            self.events.append(("fsync", self.state(os.fstat(file))))
            fsync(file)

        def noting_rename(source: Path, target: Path) -> None:
            paths = [source, *source.rglob("*")]
            self.trees[str(target)] = {path: self.state(path.stat()) for path in paths}
            self.events.append(("rename", str(target)))
            rename(source, target)

        patch.setattr(os, "fsync", noting_fsync)
        patch.setattr(os, "replace", noting_rename)

    @staticmethod
    def state(facts: os.stat_result) -> tuple[int, int]:
        """Inode and, of a file, its size: what was written after the fsync does not count."""
        return facts.st_ino, 0 if facts.st_mode & 0o040000 else facts.st_size

    def when(self, kind: str, value: Any) -> list[int]:
        return [n for n, event in enumerate(self.events) if event == (kind, value)]

    def assert_durable(self, target: Path) -> int:
        """What was renamed to ``target`` was on disk by then, and its name is at once after."""
        renamed = self.assert_named(target)
        synced = {}
        for path, state in self.trees[str(target)].items():
            synced[path] = [n for n in self.when("fsync", state) if n < renamed]
            assert synced[path], f"{path.name} is renamed before it is synced"
        for path in synced:
            for child in synced.keys() & set(path.glob("*")):
                assert synced[path][-1] > synced[child][0], f"the name {child.name} is not synced"
        return renamed

    def assert_named(self, target: Path) -> int:
        """The folder is synced at once after the rename; returns when that was."""
        [renamed] = self.when("rename", str(target))
        parent = self.state(target.parent.stat())
        assert self.events[renamed + 1] == ("fsync", parent), "the new name is not synced"
        return renamed


def test_all_is_synced_before_it_counts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    store.begin_run(RUN)
    write(store, "a", "b")
    root = store.root
    segment = disk.assert_durable(root / "segments" / "r0" / "000001")
    assert len(disk.trees[str(root / "segments/r0/000001")]) == 1 + 2 + 7 * 3
    created = disk.assert_named(root / catalog.NAME)  # DuckDB syncs the file itself
    published = [disk.assert_durable(root / "published" / f"catalog-{n}.duckdb") for n in (1, 2)]
    assert created < published[0] < segment < published[1]
    assert disk.when("fsync", disk.state((root / "segments").stat()))[0] < segment


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here: {getattr(error, 'stderr', error)}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    store = Store.create(small_disk / "store", profile="raw")
    store.begin_run(RUN)
    into, acknowledged = SegmentWriter(store, store.run()), list[Record]()

    def until_full() -> None:
        while True:
            ids = [f"{len(acknowledged) + n}" for n in range(4)]
            into.put(records(*ids, rows=400, tail=TAIL))
            into.flush()
            acknowledged.extend(records(*ids, rows=400, tail=TAIL))

    with pytest.raises(StoreUnwritable, match=r"^cannot write .*No space left on device"):
        until_full()
    with pytest.raises(StoreUnwritable):
        into.close()
    assert len(acknowledged) >= 4
    store.refresh()
    with Store.open(store.root) as again:
        found = list(everything(again).values())
        assert_all_equal(found[: len(acknowledged)], acknowledged)

    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    with Store.open(store.root) as again:
        write(again, "after")
        acknowledged.append(record("after", tail=TAIL))
        kept = everything(again)
        assert_all_equal([kept[one.exposure.id] for one in acknowledged], acknowledged)
    assert unfinished(again) == []
    assert verify(again.root) == []
