"""Encrypted stores: what is erased is shredded, what is killed is not lost, commands work."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import ALL, BATCHES, TAIL, assert_has, contents, damages, drop, write
from encrypted import KEY, Filled, read_by_id
from erased import IDS, state
from records import RUN, assert_all_equal, assert_equal, record, tail
from tiny import FRESH, Tiny, files, run, run_json
from victims import Victims, everything

from gradstore import Store
from gradstore.errors import EncryptionError, InfluenceError, StoreDamaged
from gradstore.influence import sketches
from gradstore.store import catalog, format, keys
from gradstore.store.distant import Distant, anywhere
from gradstore.store.manifest import segment_path
from gradstore.store.sealed import open_array, write_sealed
from gradstore.store.segment import SegmentReader
from gradstore.store.writer import SegmentWriter
from gradstore.upkeep import erase as erasing
from gradstore.upkeep.compact import compact
from gradstore.upkeep.erase import erase
from gradstore.upkeep.repair import repair
from gradstore.upkeep.verify import verify

pytest_plugins = ["encrypted", "elsewhere"]
pytestmark = pytest.mark.usefixtures("master_key")


# -- erasing -------------------------------------------------------------------------------------


def backup(store: Store, to: Path) -> Path:
    """All of a store but its keys."""
    store.refresh()
    return shutil.copytree(store.root, to, ignore=shutil.ignore_patterns("keys"))


def with_keys(root: Path, of: Store) -> Store:
    shutil.copytree(of.root / "keys", root / "keys")
    return Store.open(root)


def test_a_backup_of_what_is_erased_cannot_be_read(filled_sealed: Filled, tmp_path: Path) -> None:
    store, made = filled_sealed
    first = backup(store, tmp_path / "first")
    compact(store, size=1 << 30)
    second = backup(store, tmp_path / "second")
    assert erase(store, ["gone-1", "held-gone"]).search.hits == []  # type: ignore[union-attr]
    assert list(keys.slots_of(store.root, ["gone-1", "held-gone"])) == []
    assert [f for f in verify(store.root) if f.damage] == []
    for root in (first, second):
        old = with_keys(root, store)
        for id in ("stays-1", "gone-2"):
            for got in read_by_id(old, id):
                assert_equal(got, made[f"{id} {got.exposure.epoch}"])
        with pytest.raises(StoreDamaged, match="shredded"):
            read_by_id(old, "gone-1")
        held = old.resolve(["held-gone", "held-stays"])
        assert old.tokens([held["held-stays"]], 1)[held["held-stays"]].tolist()[0] == 300
        with pytest.raises(StoreDamaged, match="shredded"):
            old.tokens([held["held-gone"]], 1)
        order = next(p for p in old.root.glob("segments/r0/*") if (p / "order").exists())
        with pytest.raises(StoreDamaged, match="shredded"):
            SegmentReader(order).tensor("order")
        without_catalog = Path(shutil.copytree(root, root.with_suffix(".bare")))
        (without_catalog / "catalog.duckdb").unlink()
        shutil.rmtree(without_catalog / "published")
        (without_catalog / "published").mkdir()
        again = Store.open(without_catalog)  # what was shredded is in no manifest either
        ids = {id for (id,) in again.rows("SELECT id FROM samples")}
        assert ids == {*IDS, "held-stays"} - {"gone-1"}
        assert any(finding.damage for finding in verify(old.root))
        assert erase(old, ["gone-1", "held-gone"]).search.hits == []  # type: ignore[union-attr]
        assert [f for f in verify(old.root) if f.damage] == []
        assert len(read_by_id(old, "stays-1")) == len(read_by_id(store, "stays-1"))


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_an_erasure_that_is_killed_while_it_shreds_is_finished(
    filled_sealed: Filled, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    store, _ = filled_sealed
    want = state(store, "gone-1", "gone-2", "held-gone")
    done: list[object] = []
    overwrite = keys._overwrite

    def dying(*arguments: Any) -> None:
        if (moment == "before") or (moment == "between" and done):
            raise KeyboardInterrupt
        overwrite(*arguments)
        done.append(arguments)

    with monkeypatch.context() as patch:
        patch.setattr(keys, "_overwrite", dying)
        if moment == "after":
            patch.setattr(keys, "_overwrite", overwrite)
            patch.setattr(erasing, "_delete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            erase(store, ["gone-1", "gone-2", "held-gone"])
    again = Store.open(store.root)  # finishes it
    assert not (again.root / "erasing").exists()
    assert list(keys.slots_of(again.root, ["gone-1", "gone-2", "held-gone"])) == []
    assert_all_equal(state(again)["records"], want["records"])
    assert [f for f in verify(again.root) if f.damage] == []
    assert erase(again, ["gone-1"]).search.hits == []  # type: ignore[union-attr]


# -- crashes -------------------------------------------------------------------------------------


def test_writers_that_are_killed_lose_nothing_acknowledged(unfilled: Store) -> None:
    acknowledged: set[str] = set()
    unfilled.begin_run(RUN)
    unfilled.refresh()
    with Victims(unfilled.root) as running:
        for n, after in enumerate((0.3, 0.6)):
            writers = {str(rank): f"{n}-r{rank}" for rank in range(2)}
            acknowledged |= running.run(writers=writers, after=after)
        for n, point in enumerate(("before the manifest", "before the rename", "after the rename")):
            running.run(writers={"0": f"at-{n}"}, point=point)
    for rank in (0, 1):
        SegmentWriter(unfilled, unfilled.run(), rank).close()
    found = everything(Store.open(unfilled.root))
    assert acknowledged <= found.keys()
    for id, one in found.items():
        assert_equal(one, record(id, tail=tail()))
    assert {"at-2-0-0"} <= found.keys()
    assert [f for f in verify(unfilled.root) if f.damage] == []


# -- all of the commands -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny ingest into an encrypted store, through the command line."""
    tiny = files(tmp_path_factory.mktemp("tiny"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADSTORE_KEY", KEY.hex())
        run("init", tiny.store, "--encrypt")
        run(
            "ingest", tiny.data, "-s", tiny.store, "--config", tiny.config, *FRESH,
            "--holdout", tiny.holdout, "--out", tiny.model,
        )  # fmt: skip
    return tiny


def test_every_command_works(sealed: Tiny, tmp_path: Path) -> None:
    at = ("-s", sealed.store)
    assert (
        run_json("sql", "SELECT grad_norm(id) AS n FROM samples WHERE id = 'p-01'", *at)[0]["n"] > 0
    )
    best = run_json("top", "--id", "p-02", *at, "-k", 2, "--with-self")
    run("sketch", *at)
    coarse = run_json("top", "--id", "p-02", *at, "-k", 2, "--with-self", "--coarse", 24)
    assert [row["id"] for row in coarse] == [row["id"] for row in best]
    best = run_json("top", "--id", "p-02", *at, "-k", 1, "--with-self", "--method", "cosine")
    few = run_json("top", "--id", "p-02", *at, "-k", 1, "--with-self", "--method", "cosine",
                   "--coarse", 2)  # fmt: skip
    assert few == best
    run("export", "--gradients", "p-01", tmp_path / "out.safetensors", *at)
    out = tmp_path / "forgotten"
    run("forget", "p-04", *at, "--model", sealed.model, "--out", out, "--dose", 1,
        "--max-holdout-increase", 9)  # fmt: skip
    update = sealed.store / "receipts" / "0001.safetensors"
    assert update.read_bytes().startswith(b"gradstore sealed 1")
    run("receipt", "verify", 1, *at)
    run("compact", *at, "--profile", "raw")
    run("erase", "p-04", *at, "--yes")
    assert not update.exists()
    assert not (sealed.store / "keys" / "receipts" / update.name).exists()
    assert "the store is sound" in run("verify", *at).stderr


def test_sketches_are_sealed_each_under_its_record_s_key(
    sealed: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(shutil.copytree(sealed.store, tmp_path / "store"))
    made: dict[Path, torch.Tensor] = {}
    write = write_sealed

    def noting(folder: Path, name: str, data: Any, *rest: Any) -> Any:
        made[folder] = torch.from_numpy(data)
        return write(folder, name, data, *rest)

    monkeypatch.setattr(sketches, "write_sealed", noting)
    sketches.sketch(store, size=64)
    opened = sketches.open_sketches(store, store.run())
    assert all(bool(rows.abs().sum() > 0) for rows in made.values())
    for got, (folder, rows) in zip(opened.blocks, made.items(), strict=True):
        assert torch.equal(got, rows)
        at = folder.with_name(folder.name.removeprefix(".tmp-"))
        assert rows[0].numpy().tobytes() not in b"".join(
            file.read_bytes() for file in at.rglob("*") if file.is_file()
        )

    [number] = store.resolve(["p-02"]).values()
    found = store.rows(
        """SELECT path, row_number() OVER (PARTITION BY path ORDER BY row_start) - 1
           FROM exposures JOIN segments USING (segment_id) QUALIFY sample_id = ?""", [number]
    )  # fmt: skip
    path = found[0][0]
    hers = [row for of, row in found if of == path]  # two, where epochs are compacted into one
    keys.shred(store.root, ["p-02"], ())
    segment = segment_path(store.root, path)
    of = store.root / "sketches" / segment.parent.name
    array = open_array(of, segment.name, keys.Keys.open(store.root, path), "sketch")
    rows = made[of / f".tmp-{segment.name}"]
    for n in range(len(rows)):
        if n in hers:
            with pytest.raises(StoreDamaged, match="shredded"):
                array.rows(n, n + 1)
        else:
            assert torch.equal(torch.from_numpy(array.rows(n, n + 1)), rows[n : n + 1])
    with pytest.raises(InfluenceError, match="shredded"):
        sketches.open_sketches(store, store.run())


# -- with segments elsewhere ---------------------------------------------------------------------


@pytest.fixture
def away(tmp_path: Path, cache_of_workers: Path) -> Store:
    """An encrypted store whose segments lie elsewhere, in the folder ``far`` beside it."""
    elsewhere = format.Elsewhere(f"file://{tmp_path}/far", 1 << 30)
    stated = format.create(tmp_path / "store", "raw", "bfloat16", elsewhere, KEY)
    store = Store(tmp_path / "store", stated)
    store.begin_run(RUN)
    write(store, *BATCHES)
    return store


def test_a_folder_that_is_lost_is_made_from_there_with_the_keys_here(away: Store) -> None:
    shutil.rmtree(away.root / "segments/r0/000001")
    assert any(done.did.startswith("brought from") for done in repair(away.root))
    assert_has(Store.open(away.root), *ALL)
    assert damages(away) == []


def test_what_nobody_can_read_there_is_searched_as_it_lies(away: Store) -> None:
    far = away.root.parent / "far"
    shutil.copytree(far / "r0/000001", far / "r0/000077")  # without keys of its own
    (far / "r0/000077/D/c.0").write_bytes(catalog.hash_of("ada").to_bytes(8, "little"))
    found = erase(away, ["ada"]).search
    assert found is not None
    assert found.hits == [f"id_hash: file://{far}: segments/r0/000077/D/c.0"]


def test_what_lies_elsewhere_is_sealed_and_its_keys_are_not_there(
    away: Store, tmp_path: Path
) -> None:
    store, root, far = away, away.root, tmp_path / "far"
    row = record("ada", tail=TAIL).D[0].view(torch.int16).numpy().tobytes()
    assert not any(row in held or b'"ada"' in held for held in contents(far).values())
    drop(store)
    assert_has(store, *ALL)
    [worker] = anywhere(store, ["segments/r0/000001"])
    assert isinstance(worker, Distant)
    with pytest.raises(EncryptionError, match=r"its keys stay in its folder"):
        replace(worker, root=tmp_path / "nowhere").here()
    drop(store)
    assert erase(store, ["ada"]).search.hits == []  # type: ignore[union-attr]
    assert_has(Store.open(root), *ALL[1:])
    assert damages(store) == []
