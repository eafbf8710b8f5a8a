"""Compacted: fewer segments, the same records to the bit, whatever interrupts it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from erased import GOING, Filled, assert_gone, packed, rebuilt, sound, state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import RUN, assert_all_equal, record, tail
from tiny import Tiny, digests, refused, run, run_json

from gradstore import Store
from gradstore.errors import SettingsError, StoreBusy, StoreDamaged
from gradstore.store import catalog, format, segment
from gradstore.store.manifest import read_manifest, segment_paths
from gradstore.store.segment import SegmentReader, pack, write_segment
from gradstore.upkeep import compact
from gradstore.upkeep.erase import erase
from gradstore.upkeep.rewrite import rewrite

pytest_plugins = ["erased", "tiny"]
LARGE = 1 << 30


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exceptions stand for crashes here, so what has reached the disk does not matter."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def written(root: Path, rank: int) -> list[tuple[str, int]]:
    """Ids and epochs that a rank's manifests have of gradients, in the order they were written."""

    def oldest(path: Path) -> str:
        name = path.relative_to(root).as_posix()
        names: list[str] = [name, *read_manifest(path)["segment"].get("replaces", [])]
        return min(names)

    found = [path for path in segment_paths(root) if path.parent.name == f"r{rank}"]
    tables = [read_manifest(path)["tables"] for path in sorted(found, key=oldest)]
    exposures = [table["exposures"] for table in tables if "exposures" in table]
    return [pair for e in exposures for pair in zip(e["id"], e["epoch"], strict=True)]


# -- merging -------------------------------------------------------------------------------------

Part = tuple[int, list[tuple[str, int]], str, str]  # rank, samples and epochs, tail, profile
PARTS = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 1]),
        st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 2)), min_size=1, max_size=4),
        st.sampled_from(["one", "one", "two", "none"]),
        st.sampled_from(format.PROFILES[:2]),
    ),
    min_size=1,
    max_size=7,
)


def ingested(root: Path, parts: list[Part]) -> Store:
    """A store with one segment for each part; a sample may come twice, and with other values."""
    store = Store.create(root, dtype="float32")
    facts = store.begin_run(RUN)
    for number, (rank, names, shared, profile) in enumerate(parts):
        one = None if shared == "none" else tail(shared)
        made = [record(id, epoch=epoch, rows=1 + number, tail=one) for id, epoch in names]
        arrays, tables = pack(made)
        folder = root / "segments" / f"r{rank}"
        folder.mkdir(exist_ok=True)
        write_segment(
            folder, run=facts, kind="gradients", profile=profile, arrays=arrays, tables=tables
        )
    store.recover()
    return store


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=PARTS,
    size=st.sampled_from([1, 8_000, 16_000, LARGE]),
    profile=st.sampled_from([None, "raw"]),
)
def test_any_segments_hold_the_same_afterwards(
    parts: list[Part], size: int, profile: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("compact") / "store"
    store = ingested(root, parts)
    before, order = state(store), [written(root, rank) for rank in (0, 1)]
    sizes = dict(store.rows("SELECT path, bytes FROM segments"))
    planned = compact.compact(store, profile=profile, size=size, dry_run=True)
    done = compact.compact(store, profile=profile, size=size)
    assert [one.replaces for one in done] == [one.replaces for one in planned]
    after = state(store)
    assert_all_equal(after.pop("records"), before.pop("records"))
    for each in (before, after):  # in no real store a sample has others in another epoch
        del each["tokens"]
    assert after == before
    assert [written(root, rank) for rank in (0, 1)] == order
    assert sound(root)
    wanted = profile or "packed"
    assert {p for (p,) in store.rows("SELECT DISTINCT profile FROM segments")} == {wanted}
    assert format.load(root).profile == wanted
    for one in done:
        assert one.before == sum(sizes[name] for name in one.replaces)
        assert len(one.replaces) == 1 or one.before <= size
    if size == LARGE:  # as few as there are neighbours alike
        lanes = [[shared == "none" for r, _, shared, _ in parts if r == rank] for rank in (0, 1)]
        alike = sum(len(list(groupby(lane))) for lane in lanes)
        assert store.rows("SELECT count(*) FROM segments") == [(alike,)]
    if size in (1, LARGE):
        assert compact.compact(store, size=size, dry_run=True) == [], "there is no more to do"


def test_a_shared_tail_stays_shared(tmp_path: Path) -> None:
    parts: list[Part] = [(0, [(n, 1) for n in names], "one", "packed") for names in ("abc", "de")]
    store = ingested(tmp_path / "store", parts)
    [done] = compact.compact(store)
    assert done.path is not None
    assert SegmentReader(store.root / done.path).rows("tail") == 2
    assert store.rows("SELECT tail_row FROM exposures ORDER BY row_start") == [
        (0,), (0,), (0,), (1,), (1,),
    ]  # fmt: skip


def test_what_is_not_alike_is_not_made_one(tmp_path: Path) -> None:
    parts: list[Part] = [(0, [("a", 1)], "one", "raw"), (0, [("b", 1)], "none", "raw")]
    store = ingested(tmp_path / "store", parts)
    with pytest.raises(ValueError, match="not gradients of one shape"):
        rewrite(store.root, segment_paths(store.root), lambda _: True, "raw")
    with pytest.raises(ValueError, match="profile is 'loud'"):
        compact.compact(store, profile="loud")


# -- what else is in a store -----------------------------------------------------------------------


def test_a_whole_store_changes_its_profile(filled: Filled) -> None:
    store, made = filled
    other = {"packed": "raw", "raw": "packed"}[store.format.profile]
    before, order = state(store), store.rows("SELECT segment_id FROM segments WHERE kind = 'order'")
    keys = store.segment(order[0][0]).tensor("order").tolist()
    [(moments,)] = store.rows("SELECT path FROM segments WHERE kind = 'moments'")
    embedding = SegmentReader(store.root / moments).tensor("embedding")
    compact.compact(store, profile=other)
    again = Store.open(store.root)
    assert again.format.profile == other
    assert {p for (p,) in again.rows("SELECT profile FROM segments")} == {other}
    for metadata in store.root.glob("segments/*/*/*/zarr.json"):
        assert (b"blosc" in metadata.read_bytes()) == (other == "packed")
    after = state(again)
    assert_all_equal(after.pop("records"), before.pop("records"))
    assert after == before
    [(number,)] = again.rows("SELECT segment_id FROM segments WHERE kind = 'order'")
    assert again.segment(number).tensor("order").tolist() == keys
    [(moments,)] = again.rows("SELECT path FROM segments WHERE kind = 'moments'")
    assert SegmentReader(store.root / moments).tensor("embedding").tolist() == embedding.tolist()
    assert sound(store.root)
    assert len(state(rebuilt(store.root))["records"]) == len(made)


@packed
def test_what_is_erased_does_not_come_back(filled: Filled, tmp_path: Path) -> None:
    store, made = filled
    old = shutil.copytree(store.root / "segments", tmp_path / "old")
    erase(store, GOING)
    before = state(store)["records"]
    compact.compact(store, profile="raw")
    for path in old.glob("r0/0*"):  # as if their removal had never reached the disk
        shutil.copytree(path, store.root / "segments" / "r0" / path.name)
    again = Store.open(store.root)
    assert_all_equal(state(again)["records"], before)
    assert_gone(again, made)
    for path in old.glob("r0/0*"):
        shutil.copytree(path, store.root / "segments" / "r0" / path.name)
    again.refresh()
    again = rebuilt(store.root)
    assert sorted(i for (i,) in again.rows("SELECT id FROM samples")) == [
        "held-stays", "stays-1", "stays-2", "stays-3",
    ]  # fmt: skip
    assert_gone(again, made)


# -- crashes -------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


def at(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, that dies instead of the call of that number."""
    calls = iter(range(1, 1 << 30))

    def mortal(*arguments: Any, **options: Any) -> Any:
        if next(calls) == count:
            raise Killed
        return function(*arguments, **options)

    return mortal


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Four segments that are to become two."""
    names = [("a", "one"), ("b", "one"), ("c", "none"), ("d", "none")]
    parts: list[Part] = [(0, [(id, 1)], shared, "packed") for id, shared in names]
    return ingested(tmp_path_factory.mktemp("many") / "store", parts)


POINTS: dict[str, tuple[Any, str, int]] = {
    "before anything is written": (segment, "write_array", 1),
    "in the first segment": (segment, "sync_tree", 1),
    "before its rename": (segment, "replace_durably", 1),
    "when it is durable": (compact, "read_manifest", 1),
    "inside the transaction": (catalog, "_retire", 1),
    "before publishing": (catalog, "publish", 1),
    "before an old folder goes": (shutil, "rmtree", 2),
    "in the second segment": (segment, "sync_tree", 2),
    "before the profile is the store's": (format.StoreFormat, "save", 1),
}


@pytest.mark.parametrize("point", POINTS)
def test_what_a_crash_interrupts_can_be_done_again(
    many: Store, tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(many)["records"]
    store = Store.open(shutil.copytree(many.root, tmp_path / "store"))
    module, name, count = POINTS[point]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, at(count, getattr(module, name)))
        with pytest.raises(Killed):
            compact.compact(store, profile="raw")
    store.refresh()
    again = Store.open(store.root)
    assert sound(store.root)
    assert_all_equal(state(again)["records"], before)
    compact.compact(again, profile="raw")
    assert_all_equal(state(again)["records"], before)
    assert again.rows("SELECT profile FROM segments") == [("raw",), ("raw",)]
    assert format.load(store.root).profile == "raw"
    assert [p.name for p in store.root.rglob("*") if ".tmp" in p.name] == []
    assert sound(store.root)


@packed
def test_not_while_another_writes(filled: Filled) -> None:
    store, _ = filled
    before = digests(store.root / "segments")
    for name in ("segments/r0/lock", "sketches.lock"):
        with (
            catalog.lock(store.root / name, 0, "ingesting into"),
            pytest.raises(StoreBusy, match=f"pid {os.getpid()}"),
        ):
            compact.compact(store, profile="raw")
    after = digests(store.root / "segments")
    assert {**after, "r0/lock": ""} == {**before, "r0/lock": ""}


@pytest.mark.parametrize("filled", ["raw"], indirect=True)
def test_damage_is_not_made_to_look_sound(filled: Filled) -> None:
    store, _ = filled
    file = store.root / "segments" / "r0" / "000001" / "D" / "c.0.0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1  # uncompressed: it can still be read
    file.write_bytes(data)
    with pytest.raises(StoreDamaged, match=r"000001/D/c.0.0 is not what was written"):
        compact.compact(store)
    assert file.read_bytes() == data


# -- to and from eight bits ----------------------------------------------------------------------


def test_float32_has_no_eight_bits(tmp_path: Path) -> None:
    store = ingested(tmp_path / "store", [(0, [("a", 1)], "one", "raw")])
    with pytest.raises(SettingsError, match="rounds bfloat16, and this store keeps float32"):
        compact.compact(store, profile="small", lossy=True)


# -- the command -----------------------------------------------------------------------------------


def test_the_command(copied: Tiny) -> None:
    assert run_json("compact", "-s", copied.store, "--segment-size", "1kb") == []
    run("sketch", "-s", copied.store)
    whole, before = digests(copied.store), state(Store.open(copied.store))["records"]
    dry = run("compact", "-s", copied.store, "--profile", "raw", "--dry-run")
    assert "would become" in dry.stderr
    assert digests(copied.store) == whole, "a dry run changes nothing"
    done = run("compact", "-s", copied.store, "--profile", "raw", "--json")
    assert "make them again: gradstore sketch" in done.stderr
    assert "ingested from now on is written raw" in done.stderr
    assert not list((copied.store / "sketches").glob("r0/*"))
    assert_all_equal(state(Store.open(copied.store))["records"], before)
    run("verify", "-s", copied.store)
    said = run("compact", "-s", copied.store, "--csv")
    assert said.stdout == (
        "first,merged,run,kind,records,bytes_before,segment,bytes_after,worst_cosine\n"
    )
    assert "nothing to merge or to rewrite" in said.stderr
    small = run("compact", "-s", copied.store, "--profile", "small", "--lossy")
    assert "the cosine of a row with what it was is at least 0.9999" in small.stderr
    run("verify", "-s", copied.store)


def test_what_the_command_refuses(copied: Tiny, tmp_path: Path) -> None:
    small = ("compact", "-s", copied.store, "--profile", "small")
    assert "writing packed as small rounds" in refused(*small, code=2)
    assert "none of packed, raw" in refused(
        "compact", "-s", copied.store, "--profile", "loud", code=2
    )
    assert "is no size" in refused("compact", "-s", copied.store, "--segment-size", "big", code=2)
    assert "no store" in refused("compact", "-s", tmp_path / "none")
    run("init", tmp_path / "empty")
    assert "holds nothing yet" in refused("compact", "-s", tmp_path / "empty")
    with catalog.lock(copied.store / "segments" / "r0" / "lock", 0, "ingesting into"):
        assert "another process" in refused("compact", "-s", copied.store, "--profile", "raw")
