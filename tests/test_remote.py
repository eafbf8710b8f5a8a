"""Stores whose segments lie elsewhere: sent, brought back, killed, cut off, erased."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_writer import SENDING
from elsewhere import ALL, BATCHES, TAIL, assert_has, contents, create, damages, drop, shards, write
from records import record, records
from victims import Victims, everything

from gradstore import Store
from gradstore.errors import StoreUnreachable
from gradstore.store import ModelIdentity, remote
from gradstore.store.distant import Distant, anywhere
from gradstore.store.format import Elsewhere
from gradstore.store.manifest import files_of
from gradstore.store.objects import Objects
from gradstore.store.writer import SegmentWriter
from gradstore.upkeep.compact import compact
from gradstore.upkeep.erase import erase

pytest_plugins = ["elsewhere"]
pytestmark = pytest.mark.usefixtures("cache_of_workers")


@pytest.fixture
def store(sent: Store) -> Store:
    """A store of three segments that are here and at ``far``."""
    return sent


# -- there and back ----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_what_is_sent_comes_back(tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}://{tmp_path}/far"
    store = create(tmp_path / "store", url)
    write(store, *BATCHES)
    sent = Objects(url).sizes()
    assert {f"r0/{n:06d}/manifest.json" for n in (1, 2, 3)} < sent.keys()
    drop(store)
    assert_has(store, *ALL)
    assert len(shards(store.root)) > 3
    assert damages(store) == []
    [done] = compact(store)
    assert {name[:9] for name in Objects(url).sizes()} == {"store", "r0/000004"}
    assert done.path == "segments/r0/000004"
    drop(store)
    assert_has(store, *ALL)


def test_a_host_cannot_make_what_has_the_same_digests(store: Store) -> None:
    compact(store, profile="raw")
    [path] = (store.root / "segments/r0").glob("0*")
    assert {frozenset(facts) for facts in files_of(path).values()} == {
        frozenset({"bytes", "blake3"})
    }


def shorten(store: Store, cache_bytes: int) -> remote.Remote:
    """Let a store keep this many bytes of its arrays."""
    elsewhere = Elsewhere(f"file://{store.root.parent}/far", cache_bytes)
    stated = replace(store.format, elsewhere=elsewhere)
    stated.save(store.root)
    return remote.Remote(store.root, stated)


def test_a_shorter_cache_keeps_what_was_used_last(store: Store) -> None:
    [one, two, three] = sorted((store.root / "segments/r0").glob("0*"))
    held = sum(path.stat().st_size for path in shards(store.root))
    for when, path in enumerate((two, three, one)):
        os.utime(path / "manifest.json", (when, when))
    store.record_at(*store.table("FROM exposures JOIN samples USING (sample_id) WHERE id = 'ben'"))
    shorten(store, held - 1).evict()
    assert [bool(list(path.glob("D/c.0.0"))) for path in (one, two, three)] == [True, False, True]
    assert_has(store, *ALL)  # brings what is needed


def test_a_plan_to_compact_brings_nothing(store: Store) -> None:
    drop(store)
    assert len(compact(store, dry_run=True)) == 1
    assert shards(store.root) == []


def test_one_segment_may_be_larger_than_the_cache(store: Store) -> None:
    shorten(store, 1).evict()
    assert shards(store.root) == []
    assert_has(store, *ALL)
    assert {path.relative_to(store.root).parts[2] for path in shards(store.root)} == {"000003"}
    assert damages(store) == []


def test_a_store_holds_what_lies_elsewhere_too(store: Store) -> None:
    model = ModelIdentity("x", 500, 16, 16, None, True)
    replace(store.format, model=model).save(store.root)
    store = Store.open(store.root)
    whole = store.stats()
    assert whole["store_bytes"] > whole["gradient_bytes"] > 0
    before = sum(path.stat().st_size for path in shards(store.root))
    drop(store)
    after = store.stats()
    assert after["gradient_bytes"] > 0.7 * whole["gradient_bytes"]
    assert whole["store_bytes"] - before < after["store_bytes"] <= whole["store_bytes"]
    assert after["store_bytes"] > after["gradient_bytes"]


def test_what_is_not_there_whole_is_never_dropped(store: Store, far: Path) -> None:
    (far / "r0/000001/manifest.json").unlink()
    (far / "r0/000002/D/c.0.0").write_bytes(b"short")
    shorten(store, 1).evict()
    assert {path.relative_to(store.root).parts[2] for path in shards(store.root)} == {
        "000001",
        "000002",
    }


# -- crashes and networks ----------------------------------------------------------------------


def test_a_killed_sender_loses_nothing(tmp_path: Path) -> None:
    root, far, known = tmp_path / "store", tmp_path / "far", ["before"]
    store = create(root, f"file://{far}")
    write(store, ("before",))
    with Victims(root) as running:
        for number, point in enumerate(SENDING):
            assert running.run(writers={"0": f"killed-{number}"}, point=point) == set()
            entered = set(everything(Store(root, store.format)))
            assert entered == set(known), "nothing is visible before it is there"
            again = Store.open(root)
            assert again.is_current()
            new = [id for id in everything(again) if id not in known]
            assert new, "what was renamed is finished"
            known += new
            assert {name[:9] for name in contents(far)} - {"store"} == {
                f"r0/{path.name}" for path in (root / "segments/r0").glob("0*")
            }
    drop(again)
    assert_has(again, *known)
    assert damages(again) == []


def test_an_error_of_the_network_stops_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    store = create(tmp_path / "store", f"file://{tmp_path}/far")
    write(store, ("ada",))
    put, calls = LocalFileSystem.put_file, count(1)

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 3:
            raise TimeoutError("no answer")
        return put(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "put_file", failing)
        into = SegmentWriter(store, store.run())
        into.put(records("ben", tail=TAIL))
        with pytest.raises(StoreUnreachable, match=r"r0/000002/.*TimeoutError: no answer"):
            into.flush()
        into.abandon()
        assert_has(store, "ada")
    write(Store.open(store.root), ("cleo",))
    assert_has(Store.open(store.root), "ada", "ben", "cleo")
    assert damages(store) == []


def test_a_mistake_in_a_program_is_not_the_networks(
    sent: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    where = Objects(sent.root.parent.joinpath("far").as_uri())
    for error, told in (
        (AttributeError, AttributeError),
        (MemoryError, MemoryError),
        (PermissionError, StoreUnreachable),
    ):

        def broken(*_: Any, error: type[Exception] = error) -> None:
            raise error("no such thing")

        monkeypatch.setattr(LocalFileSystem, "cat_file", broken)
        with pytest.raises(told, match="no such thing"):
            where.read("r0/000001/manifest.json")


def test_a_reader_without_network_reads_what_is_here(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise StoreUnreachable("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Objects, "put", refuse)
        with pytest.raises(StoreUnreachable, match="the network is gone"):
            write(store, ("fay",))
        again = Store.open(store.root)
        assert not again.is_current()
        assert_has(again, *ALL)
    assert_has(Store.open(store.root), *ALL, "fay")


def test_what_another_rank_is_sending_is_entered_when_it_is_there(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (SegmentWriter(store, store.run(), rank) for rank in (0, 1))
    second.put(records("fay", tail=TAIL))
    second.flush()
    with monkeypatch.context() as patch:
        patch.setattr(Objects, "put", lambda *_: None)  # never arrives
        second.put_state("moments", {"embedding": torch.rand(2, 2)}, {})
    first.flush()
    names = {path for (path,) in store.rows("SELECT path FROM segments")}
    assert "segments/r1/000001" in names
    assert "segments/r1/000002" not in names
    for writer in (first, second):
        writer.close()
    assert Store.open(store.root).is_current()
    assert_has(Store.open(store.root), *ALL, "fay")


# -- erasing -----------------------------------------------------------------------------------


def test_what_is_erased_is_gone_there_too(store: Store, far: Path, cache_of_workers: Path) -> None:
    [worker] = anywhere(store, ["segments/r0/000001"])
    assert isinstance(worker, Distant)
    cached = Distant(Path("/nowhere"), worker.name, worker.digest, worker.stated).here()
    assert cached.is_relative_to(cache_of_workers)
    row = record("ada", tail=TAIL).D[0].view(torch.int16).numpy().tobytes()
    compact(store, profile="raw")
    assert any(row in bytes for bytes in contents(far).values())
    drop(store)
    found = erase(store, ["ada"]).search
    assert found is not None
    assert found.hits == []
    for bytes in [*contents(far).values(), *contents(store.root).values()]:
        assert row not in bytes
        assert b'"ada"' not in bytes
    assert not cached.exists()
    assert_has(Store.open(store.root), *ALL[1:])
    assert damages(store) == []


def test_the_search_finds_what_is_left_there(store: Store, far: Path) -> None:
    shutil.copytree(far / "r0/000001", far / "r0/000077")
    found = erase(store, ["ada"]).search
    assert found is not None
    url = f"file://{far}: segments/r0/000077"
    assert f"id: {url}/manifest.json" in found.hits
    assert f"D: {url}/D, decoded" in found.hits
    assert (store.root / "catalog.duckdb").exists()


@pytest.mark.parametrize("step", ["put", "remove"])
def test_an_erasure_that_is_cut_off_is_finished(
    store: Store, far: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise StoreUnreachable("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Objects, step, refuse)
        with pytest.raises(StoreUnreachable, match="the network is gone"):
            erase(store, ["ada"])
        assert (far / "r0/000001").exists()
        assert (store.root / "segments/r0/000001").exists(), "it tells of what is there"
        Store.open(store.root)
    assert_has(Store.open(store.root), *ALL[1:])
    assert not (far / "r0/000001").exists()
    assert not (store.root / "segments/r0/000001").exists()
