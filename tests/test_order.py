"""Of an epoch that was met twice the first record counts, however the catalog was made."""

import os
import shutil
from contextlib import closing
from dataclasses import replace

import pytest
from records import RUN, assert_all_equal, record, records

from gradstore import Store
from gradstore.store import catalog
from gradstore.store.manifest import MANIFEST, segment_paths
from gradstore.store.writer import SegmentWriter
from gradstore.upkeep.compact import compact
from gradstore.upkeep.erase import erase
from gradstore.upkeep.repair import repair
from gradstore.upkeep.verify import verify


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.parametrize("lost", [(catalog.NAME,), (catalog.NAME, "published")])
def test_a_segment_keeps_its_place_when_it_is_written_again(
    store: Store, lost: tuple[str, ...]
) -> None:
    store.begin_run(RUN)
    into = SegmentWriter(store, store.run())
    first, second = record("twice"), record("another", rows=5)
    for batch in ([first, *records("gone")], [replace(second, exposure=first.exposure)]):
        into.put(batch)
        into.flush()
    into.close()
    erase(store, ["gone"])
    store.refresh()
    (store.root / catalog.NAME).unlink()
    if "published" in lost:
        shutil.rmtree(store.root / "published")
    repair(store.root)
    again = Store.open(store.root)
    assert_all_equal(list(again.records(list(again.resolve(["twice"]).values()), 1)), [first])
    assert verify(store.root) == []


@pytest.mark.parametrize("suffix", ["", ".2"])
def test_a_segment_that_is_put_back_removes_nothing_newer(store: Store, suffix: str) -> None:
    store.begin_run(RUN)

    def ingest(*ids: str) -> None:
        with closing(SegmentWriter(store, store.run())) as into:
            for id in ids:
                into.put(records(id))
                into.flush()

    ingest("a", "b")
    compact(store)
    [path] = segment_paths(store.root)
    manifest = path / MANIFEST
    sound = manifest.read_bytes()
    manifest.write_bytes(b"damaged")
    repair(store.root)
    [aside] = (store.root / "quarantine" / "segments" / "r0").iterdir()
    aside = aside.rename(aside.with_name(aside.name + suffix))  # the second of its name
    store.refresh()
    ingest("c", "d")
    (aside / MANIFEST).write_bytes(sound)
    aside.rename(path)
    again = Store.open(store.root)
    wanted = records(*"abcd")
    found = again.resolve([*"abcd"])
    assert_all_equal(list(again.records([found[id] for id in "abcd"], 1)), wanted)
    assert verify(store.root) == []
