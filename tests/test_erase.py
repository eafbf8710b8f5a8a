"""Erased means gone: from every file, decoded or not, and whatever interrupts it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import stat
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from erased import GOING, Filled, assert_gone, contents, packed, patterns, row_of, state, where
from models import EXACT, batch_of, samples, sgd, tiny
from records import RUN, assert_all_equal, record, records, tail
from tiny import digests
from torch import Tensor

import gradstore
from gradstore import Store
from gradstore.errors import DataError, IdError, StoreBusy, StoreDamaged
from gradstore.store import audit, catalog, erasures, segment
from gradstore.store.erasures import Refused, allow
from gradstore.store.record import Record
from gradstore.store.writer import SegmentWriter
from gradstore.upkeep import erase
from gradstore.upkeep.repair import repair
from gradstore.upkeep.verify import verify

pytest_plugins = ["erased"]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exceptions stand for crashes here, so what has reached the disk does not matter."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_nothing_is_left_and_the_others_are_the_same_to_the_bit(
    filled: Filled,
) -> None:
    store, made = filled
    held = contents(store.root).values()
    for name, pattern in patterns(made).items():  # else not finding them would say nothing
        assert any(pattern in data for data in held), name
    before = state(store, *GOING)
    done = erase.erase(store, GOING)
    assert done.search is not None
    assert (done.search.hits, done.search.skipped) == ([], [])
    assert done.rows == {"exposures": 5, "holdout": 1, "holdout_losses": 1, "samples": 3}
    assert_gone(store, made)
    after = state(Store.open(store.root))
    assert_all_equal(after.pop("records"), before.pop("records"))
    assert after == before
    want = [one for name, one in made.items() if name.split()[0] not in GOING]
    got = list(store.records([2, 3, 5], 1))
    order = {(r.exposure.id, r.exposure.epoch): r for r in want}
    assert_all_equal(got, [order[r.exposure.id, r.exposure.epoch] for r in got])
    assert len(got) == len(want)
    assert Store.open(store.root).is_current()
    assert [p.name for p in store.root.rglob("*") if ".tmp" in p.name or p.suffix == ".wal"] == []


def test_a_tail_goes_with_the_last_that_used_it(store: Store) -> None:
    store.begin_run(RUN)
    into = SegmentWriter(store, store.run())
    own, shared = tail("own"), tail("shared")
    into.put([*records("gone", tail=own), *records("also-gone", "stays", tail=shared)])
    into.close()
    erase.erase(store, ["gone", "also-gone"])
    assert not where(store.root, own.numpy().tobytes())
    assert where(store.root, shared.numpy().tobytes())
    assert_all_equal(list(store.records([3], 1)), records("stays", tail=shared))


def test_a_second_copy_that_the_catalog_left_out_goes_too(store: Store) -> None:
    store.begin_run(RUN)
    into = SegmentWriter(store, store.run())
    into.put(records("twice", "stays-1", tail=tail()))
    into.flush()
    again = record("twice", rows=9)
    into.put([again, *records("stays-2")])
    into.close()
    assert where(store.root, row_of(again.D))
    erase.erase(store, ["twice"])
    assert not where(store.root, row_of(again.D))
    assert not where(store.root, b"twice")
    assert_all_equal(list(store.records([2, 3], 1)), [
        *records("stays-1", tail=tail()), *records("stays-2"),
    ])  # fmt: skip


def test_the_catalog_is_rebuilt_from_the_segments_without_it(
    filled: Filled,
) -> None:
    store, made = filled
    erase.erase(store, GOING)
    before = state(store)["records"]
    store.refresh()
    (store.root / catalog.NAME).unlink()
    for path in (store.root / "published").iterdir():
        path.unlink()
    rebuilt = Store.open(store.root)
    got = {(r.exposure.id, r.exposure.epoch): r for r in state(rebuilt)["records"]}
    assert_all_equal([got[r.exposure.id, r.exposure.epoch] for r in before], before)
    assert len(got) == len(before)
    assert_gone(rebuilt, made)


# -- crashes -------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


def at(
    count: int, function: Callable[..., Any], when: Callable[..., bool] = lambda *_: True
) -> Any:
    """``function``, that dies instead of the call of that number of those ``when`` picks."""
    calls = 0

    def mortal(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += when(*arguments)
        if calls == count and when(*arguments):
            raise Killed
        return function(*arguments, **options)

    return mortal


def _fresh(source: Path, *_: object) -> bool:
    return source.name == ".tmp-catalog.duckdb"


POINTS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "before the transaction that marks it": (erase, "make_key", lambda f: at(1, f)),
    "when it is marked": (erase, "_finish", lambda f: at(1, f)),
    "in the first segment": (segment, "sync_tree", lambda f: at(1, f)),
    "before a segment's rename": (segment, "replace_durably", lambda f: at(2, f)),
    "between segments": (erase, "rewrite", lambda f: at(3, f)),
    "inside the transaction": (erase, "_delete", lambda f: at(1, f)),
    "after the transaction": (shutil, "rmtree", lambda f: at(2, f)),
    "before the catalog moves": (catalog, "renew", lambda f: at(1, f)),
    "before its rename": (catalog, "replace_durably", lambda f: at(1, f, _fresh)),
    "before publishing": (catalog, "publish", lambda f: at(3, f)),
    "before old snapshots go": (catalog, "remove", lambda f: at(2, f)),
    "before the file that says so goes": (erase, "search", lambda f: at(1, f)),
}


@packed
@pytest.mark.parametrize("point", POINTS)
def test_what_a_crash_interrupts_the_next_to_open_finishes(
    filled: Filled, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, made = filled
    before = state(store, *GOING)
    module, name, dying = POINTS[point]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, dying(getattr(module, name)))
        with pytest.raises(Killed):
            erase.erase(store, GOING)
    store.refresh()
    again = Store.open(store.root)
    assert not (store.root / catalog.ERASING).exists()
    begun = point != "before the transaction that marks it"
    after = state(again, *(() if begun else GOING))
    assert_all_equal(after.pop("records"), before.pop("records"))
    assert after == before
    if not begun:
        assert set(again.resolve(GOING)) == set(GOING), "nothing was asked for yet"
        erase.erase(again, GOING)
    assert_gone(again, made)
    assert audit.check(again.table(audit.SELECT)) == []


def _hold(root: Path, ready: Any, done: Any) -> None:
    with catalog.lock(root / "segments" / "r0" / "lock", 0, "ingesting into"):
        ready.set()
        done.wait(30)


@packed
def test_not_while_another_process_ingests(filled: Filled) -> None:
    store, _ = filled
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(store.root, ready, done))
    other.start()
    ready.wait(30)
    before = digests(store.root / "segments")
    with pytest.raises(StoreBusy, match=f"pid {other.pid}"):
        erase.erase(store, ["gone-1"])
    done.set()
    other.join()
    assert digests(store.root / "segments") == before
    assert not (store.root / catalog.ERASING).exists()


# -- what is refused -------------------------------------------------------------------------------


@packed
def test_what_was_erased_is_refused_until_it_is_allowed(filled: Filled) -> None:
    store, made = filled
    tokens = made["gone-1 1"].tokens
    erase.erase(store, ["gone-1", "held-gone"])
    refuse = Refused.of(store)
    for sample in ({"gone-1": torch.arange(9)}, {"new-id": tokens}, {"held-gone": tokens}):
        with pytest.raises(DataError, match="erased from this store.*--allow-erased"):
            refuse.check(sample)
    refuse.check({"stays-1": torch.arange(9), "new": tokens[1:]})
    assert allow(store, {"gone-1": tokens, "new": torch.arange(3)}) == ["gone-1"]
    Refused.of(store).check({"gone-1": tokens})
    with pytest.raises(DataError, match="held-gone"):
        Refused.of(store).check({"held-gone": tokens})
    into = SegmentWriter(store, store.run())
    into.put([made["gone-1 1"]])
    into.close()
    erase.erase(store, ["gone-1"])
    with pytest.raises(DataError, match="gone-1"):
        Refused.of(store).check({"gone-1": tokens})
    kinds = [kind for (kind,) in store.rows("SELECT kind FROM audit ORDER BY number")]
    assert kinds == ["erase", "search", "override", "erase", "search"]


@packed
def test_allowing_a_duplicate_allows_no_other(filled: Filled) -> None:
    store, made = filled
    tokens = made["gone-1 1"].tokens
    erase.erase(store, ["gone-1"])
    assert allow(store, {"its-double": tokens}) == ["its-double"]
    Refused.of(store).check({"its-double": tokens, "another": tokens})
    for its in (tokens, torch.arange(9)):
        with pytest.raises(DataError, match="'gone-1' was erased"):
            Refused.of(store).check({"gone-1": its})
    assert allow(store, {"gone-1": tokens}) == ["gone-1"]
    Refused.of(store).check({"gone-1": tokens})


@packed
def test_without_the_key_nothing_tells_who_was_erased(filled: Filled, tmp_path: Path) -> None:
    store, made = filled
    one = {"gone-1": made["gone-1 1"].tokens}
    erase.erase(store, ["gone-1"])
    key = store.root / erasures.KEY
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    said = json.dumps(store.table("FROM erasures") + store.table("FROM audit"), default=str)
    for guess in (b"gone-1", _as_int32(one["gone-1"])):
        assert audit.hash_of(store.format.store, guess) not in said
        assert sha256(guess).hexdigest() not in said
    good = key.read_bytes()
    for at in range(len(good)):
        key.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        found = [f.file for f in verify(store.root) if f.damage] if at % 40 == 0 else None
        assert found in ([erasures.KEY], None)
        with pytest.raises(StoreDamaged, match="nobody can tell what was erased"):
            Refused.of(store)
    key.unlink()
    assert [f.file for f in verify(store.root) if f.damage] == [erasures.KEY]
    with pytest.raises(StoreDamaged, match="is gone: nobody can tell what was erased"):
        Refused.of(store)
    key.write_bytes(good)
    with pytest.raises(DataError, match="'gone-1' was erased"):
        Refused.of(store).check(one)
    key.write_bytes(good[1:])
    [planned] = repair(store.root, dry_run=True)
    [done] = repair(store.root)
    assert done.did == f"{planned.did}: 1 records"
    assert not any(finding.damage for finding in verify(store.root))
    store.refresh()
    Refused.of(store).check(one)
    erase.erase(store, ["stays-1"])
    with pytest.raises(DataError, match="'stays-1' was erased"):
        Refused.of(store).check({"stays-1": torch.arange(3)})


@packed
def test_the_hashes_of_older_stores_are_known(filled: Filled) -> None:
    store, made = filled
    tokens = made["gone-1 1"].tokens
    erase.erase(store, ["gone-1"])
    names = [audit.hash_of(store.format.store, it) for it in ("gone-1", _as_int32(tokens))]
    with store.transaction() as connection:
        connection.execute("UPDATE erasures SET id_hash = ?, tokens_hash = ?", names)
    (store.root / erasures.KEY).unlink()
    store.refresh()
    for sample in ({"gone-1": torch.arange(9)}, {"new-id": tokens}):
        with pytest.raises(DataError, match="erased from this store"):
            Refused.of(store).check(sample)
    assert erasures.known(store, ["gone-1", "stays-1"]) == ["gone-1"]
    erase.erase(store, ["stays-1"])  # which makes the key
    for sample in ({"gone-1": torch.arange(9)}, {"new-id": tokens}):
        with pytest.raises(DataError, match="erased from this store"):
            Refused.of(store).check(sample)
    assert allow(store, {"gone-1": tokens}) == ["gone-1"]
    Refused.of(store).check({"gone-1": tokens})


def _as_int32(tokens: Tensor) -> bytes:
    return tokens.numpy().astype("<i4").tobytes()


def test_capture_refuses_what_was_erased(store: Store) -> None:
    model, tokens = tiny("gpt2"), samples(2)
    [gone, stays] = tokens
    with gradstore.capture(model, store, optimizer := sgd(model), **EXACT):
        model(**batch_of(tokens)).loss.backward()
        optimizer.step()
    erase.erase(store, [gone])

    def again() -> None:
        with gradstore.capture(model, store, sgd(model), **EXACT):
            model(**batch_of(tokens)).loss.backward()

    with pytest.raises(DataError, match=f"{gone!r} was erased"):
        again()
    assert store.rows("SELECT id FROM samples") == [(stays,)]


def test_going_on_reads_what_was_published_by_then(store: Store) -> None:
    model, tokens = tiny("gpt2"), samples(2)
    with gradstore.capture(model, store, optimizer := sgd(model), **EXACT):
        model(**batch_of(tokens)).loss.backward()
        optimizer.step()
    assert store.run()["name"] == "run-1"
    Store.open(store.root).update_run(1, name="renamed")
    with gradstore.capture(model, store, sgd(model), run="renamed", resume=True, **EXACT) as again:
        assert again.run["run_id"] == 1


@packed
def test_ids_are_wanted_in_full(filled: Filled) -> None:
    store, _ = filled
    with pytest.raises(IdError, match="in full: give 'held-stays'"):
        erase.erase(store, ["stays-1", "held-s"])
    erase.erase(store, ["held-gone"])
    with pytest.raises(IdError, match="no sample"):
        erase.erase(store, ["held-gone-2"])
    assert erase.erase(store, ["held-gone"]).again == ["held-gone"]  # not another it begins


def test_an_id_within_others_is_told_from_them(store: Store) -> None:
    store.begin_run(RUN)
    into = SegmentWriter(store, store.run())
    into.put(records("p-1", "p-10", "p-1-b", "7", "77"))
    into.close()
    done = erase.erase(store, ["p-1", "7"])
    assert done.search is not None
    assert done.search.hits == []
    assert [i for (i,) in store.rows("SELECT id FROM samples ORDER BY id")] == [
        "77",
        "p-1-b",
        "p-10",
    ]


@packed
def test_what_is_left_of_it_elsewhere_is_found(filled: Filled) -> None:
    store, made = filled
    copy = made["gone-1 1"]
    into = SegmentWriter(store, store.run())
    twin = Record(record("twin").exposure, copy.tokens, copy.scored, copy.D, None)
    into.put([twin])
    into.close()
    (store.root / "notes.txt").write_text("ask about gone-1.")
    done = erase.erase(store, ["gone-1"])
    assert done.search is not None
    assert "id: notes.txt" in done.search.hits
    held = {hit for hit in done.search.hits if hit.endswith("decoded")}
    [(twins,)] = store.rows(
        "SELECT path FROM segments JOIN exposures USING (segment_id) JOIN samples USING (sample_id)"
        " WHERE id = 'twin'"
    )
    assert held == {f"tokens: {twins}/tokens, decoded", f"D: {twins}/D, decoded"}


# -- segments ------------------------------------------------------------------------------------
