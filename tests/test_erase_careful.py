"""Erasing touches nothing that it should not: damage, links and look-alike words."""

from __future__ import annotations

from pathlib import Path

import pytest
from erased import GOING, Filled, state
from records import RUN, assert_all_equal, records, tail
from tiny import digests

from gradstore import Store
from gradstore.errors import IdError, StoreDamaged
from gradstore.store import catalog
from gradstore.store.writer import SegmentWriter
from gradstore.upkeep import erase
from gradstore.upkeep.verify import verify

pytest_plugins = ["erased"]


def test_damage_is_found_before_anything_is_erased(filled: Filled) -> None:
    store, _ = filled
    array = store.root / "segments" / "r0" / "000001" / "D" / "c.0.0"
    data = bytearray(array.read_bytes())
    data[20] ^= 1
    array.write_bytes(data)
    before = digests(store.root)
    with pytest.raises(StoreDamaged, match="set it aside with `gradstore verify"):
        erase.erase(store, GOING)
    after = digests(store.root)
    assert {name for name in after if after[name] != before.get(name)} == {"sketches.lock"}
    assert Store.open(store.root).is_current()


@pytest.mark.parametrize("id", ["tokens", "gradients", "one", "exposures"])
def test_a_word_of_the_manifests_is_an_id_like_others(id: str, tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    store.begin_run({**RUN, "name": "one"})
    writer = SegmentWriter(store, store.run())
    writer.put(records(id, "other"))
    writer.flush()
    writer.put(records("third"))
    writer.close()
    kept = state(store, id)
    done = erase.erase(store, [id])
    assert done.segments == ["segments/r0/000001"]
    after = state(Store.open(store.root))
    assert_all_equal(after.pop("records"), kept.pop("records"))


@pytest.mark.parametrize("profile", ["packed", "raw", "small"])
def test_what_records_that_begin_alike_share_is_no_trace(profile: str, tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", profile=profile)
    store.begin_run({**RUN, "name": "one"})
    gone, other = records("gone-1", "other", rows=9, tail=tail())
    assert gone.output is not None
    assert other.output is not None
    gone.output.H[:8] = other.output.H[:8]
    gone.tokens[:9] = other.tokens[:9]
    writer = SegmentWriter(store, store.run())
    writer.put([gone, other])
    writer.close()
    search = erase.erase(store, ["gone-1"]).search
    assert search is not None
    assert search.hits == []


def test_no_figure_of_it_is_left_nor_what_a_killed_request_wrote(filled: Filled) -> None:
    store, _ = filled
    [gone], [stays] = (list(store.resolve([id]).values()) for id in ("gone-1", "stays-1"))
    with store.transaction() as connection:
        for evaluation, role, sample in (
            (1, "forget", gone), (1, "forget", stays), (1, "forget", None), (1, "holdout", None),
            (2, "forget", stays), (2, "forget", None),
        ):  # fmt: skip
            row = {"evaluation_id": evaluation, "role": role, "sample_id": sample, "model": 1.0}
            catalog.insert(
                connection, "measurements", {k: [v] for k, v in {**row, "metric": "loss"}.items()}
            )
    left = store.root / "receipts" / "0009.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"a sum of steps")
    erase.erase(store, ["gone-1"])
    assert not left.exists()
    store.refresh()
    assert store.rows("SELECT evaluation_id, role, sample_id FROM measurements ORDER BY ALL") == [
        (1, "forget", stays), (1, "holdout", None), (2, "forget", stays), (2, "forget", None),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["sketches", "quarantine"])
def test_nothing_is_deleted_behind_a_link(name: str, filled: Filled, tmp_path: Path) -> None:
    store, _ = filled
    outside = tmp_path / "outside" / "r0" / "000001"
    outside.mkdir(parents=True)
    (outside / "precious").write_text("mine")
    (store.root / name).symlink_to(tmp_path / "outside")
    with pytest.raises(StoreDamaged, match="symbolic link"):
        erase.erase(store, GOING)
    assert (outside / "precious").read_text() == "mine"


def test_paths_are_not_changed_by_numbers(filled: Filled) -> None:
    store, _ = filled
    with store.transaction() as connection:
        connection.execute("UPDATE runs SET checkpoint = '/models/ckpt-4'")
        erase._delete(connection, {"4": 1})
    assert store.run()["checkpoint"] == "/models/ckpt-4"


def test_the_new_catalog_is_the_owners_alone(filled: Filled) -> None:
    store, _ = filled
    erase.erase(store, GOING)
    assert (store.root / catalog.NAME).stat().st_mode & 0o777 == 0o600
    assert [finding for finding in verify(store.root) if finding.damage] == []


def test_figures_of_a_sample_erased_meanwhile_are_not_entered(filled: Filled) -> None:
    store, _ = filled
    numbers = list(store.resolve(["gone-1", "stays-1"]).values())
    erase.erase(store, GOING)
    with store.transaction() as connection:
        catalog.check_there(connection, numbers[1:], ["stays-1"])
        for sample_ids, ids in ((numbers, []), ([], ["gone-1"])):
            with pytest.raises(IdError, match="erased meanwhile: run the same command again"):
                catalog.check_there(connection, sample_ids, ids)
