"""What a store's records are in another profile: the same, or in eight bits and known to be."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from erased import Filled, packed, rebuilt, sound
from records import RUN, assert_all_equal, record, tail
from torch import Tensor

from gradstore import Store
from gradstore.errors import SettingsError
from gradstore.store import catalog
from gradstore.store.manifest import read_manifest
from gradstore.store.record import Record
from gradstore.store.segment import SegmentReader
from gradstore.store.writer import SegmentWriter
from gradstore.upkeep import compact, rewrite

pytest_plugins = ["erased"]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def spread(store: Store) -> dict[tuple[str, int], Record]:
    """Three segments of records, some of whose rows are all zeros or have an outlier."""
    into, made, shared = SegmentWriter(store, store.begin_run(RUN)), [], tail()
    for ids in ("ab", "cd", "e"):
        batch = [record(id, rows=40, width=64, tail=shared) for id in ids]
        batch[0].D[3] = 0
        batch[0].D[4, 5] = 300
        into.put(batch)
        into.flush()
        made += batch
    into.close()
    return {(one.exposure.id, one.exposure.epoch): one for one in made}


def kept(store: Store) -> list[Record]:
    numbers = [number for (number,) in store.rows("SELECT sample_id FROM samples ORDER BY ALL")]
    return list(store.records(numbers, 1))


def factors(one: Record) -> Iterator[Tensor]:
    assert one.output is not None
    yield one.D
    yield one.output.H


def test_small_is_asked_for_and_says_what_it_did(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    spread(store)
    before = kept(store)
    with pytest.raises(SettingsError, match=r"rounds factors.*cosine.*--profile small --lossy"):
        compact.compact(store, profile="small")
    assert {one.exposure.id for one in before} == set("abcde")
    [done] = compact.compact(store, profile="small", lossy=True)
    assert (done.after or 0) < 0.8 * done.before
    assert sound(store.root)
    after, worst = kept(store), 1.0
    for was, now in zip(before, after, strict=True):
        for x, y in zip(factors(was), factors(now), strict=True):
            for a, b in zip(x.double(), y.double(), strict=True):
                if not torch.equal(a, b):
                    worst = min(worst, float(a @ b / (a.norm() * b.norm())))
        assert was.output is not None
        assert now.output is not None
        same = replace(now, D=was.D, output=replace(now.output, H=was.output.H))
        assert_all_equal([same], [was])
        assert torch.equal(now.D[3:5], was.D[3:5]) or was.exposure.id in "bd"
    assert 0.9999 <= worst < 1
    assert done.cosine == pytest.approx(worst, abs=1e-9)
    assert store.format.profile == "small"


def test_out_of_small_comes_what_was_read_there(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", profile="small")
    spread(store)
    before = kept(store)
    for profile in ("raw", "packed"):
        [done] = compact.compact(store, profile=profile)
        assert done.cosine is None
        assert done.path is not None
        assert_all_equal(kept(store), before)
        path = store.root / done.path
        assert SegmentReader(path).stored("D").dtype is torch.bfloat16
        assert not (path / "D.step").exists()
        said = json.loads((path / "manifest.json").read_text())
        assert said["rounded"], "what was in eight bits does not look exact later"
    assert sound(store.root)
    assert_all_equal(kept(rebuilt(store.root)), before)


def test_what_is_small_is_merged_without_rounding_again(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", profile="small")
    spread(store)
    before = kept(store)
    [done] = compact.compact(store, profile="small")
    assert (len(done.replaces), done.cosine) == (3, None)
    assert_all_equal(kept(store), before)


@packed
def test_a_segment_can_be_rewritten_in_another_profile(filled: Filled) -> None:
    store, made = filled
    [path, *_] = [store.root / p for (p,) in store.rows("SELECT path FROM segments ORDER BY path")]
    new = rewrite.rewrite(store.root, [path], lambda _: True, "raw")
    with store.transaction() as connection:
        name = new.relative_to(store.root).as_posix()
        catalog.commit_segment(connection, name, read_manifest(new))
    Store.open(store.root)
    assert not path.exists()
    assert b"blosc" not in (new / "D" / "zarr.json").read_bytes()
    got = {(r.exposure.id, r.exposure.epoch): r for r in store.records([1, 2, 3, 4, 5], 1)}
    assert len(got) == len(made)
    assert_all_equal(
        [got[one.exposure.id, one.exposure.epoch] for one in made.values()], list(made.values())
    )
