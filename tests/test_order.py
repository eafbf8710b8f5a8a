"""Of an epoch that was met twice the first record counts, however the catalog was made."""

import os
import shutil
from dataclasses import replace

import pytest
from records import RUN, assert_all_equal, record, records

from gradstore import Store
from gradstore.store import catalog
from gradstore.store.erase import erase
from gradstore.store.repair import repair
from gradstore.store.verify import verify
from gradstore.store.writer import SegmentWriter


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
