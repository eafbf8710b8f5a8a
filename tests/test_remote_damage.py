"""Segments that lie elsewhere: damage there and here, whose place it is, and other machines."""

from __future__ import annotations

import pickle
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from elsewhere import ALL, BATCHES, TAIL, assert_has, contents, create, damages, drop, flip, write
from fsspec.registry import _registry
from records import assert_all_equal, record
from tiny import refused, run
from victims import everything

from gradstore import Store
from gradstore.errors import SettingsError, StoreDamaged, StoreExists
from gradstore.influence.lens import lenses
from gradstore.influence.rows import Place
from gradstore.influence.scan import score_segment
from gradstore.store import ModelIdentity, remote
from gradstore.store.distant import Distant, anywhere
from gradstore.store.format import Elsewhere
from gradstore.store.objects import Objects
from gradstore.store.segment import SegmentReader
from gradstore.upkeep.compact import compact
from gradstore.upkeep.erase import erase
from gradstore.upkeep.repair import repair

pytest_plugins = ["elsewhere"]
pytestmark = pytest.mark.usefixtures("cache_of_workers")
D = "segments/r0/000001/D/c.0.0"


@pytest.fixture
def store(sent: Store) -> Store:
    """A store of three segments that are here and at ``far``."""
    return sent


# -- damage ------------------------------------------------------------------------------------


def test_a_flipped_byte_there_is_found_and_mended(store: Store, far: Path) -> None:
    flip(far / "r0/000001/D/c.0.0")
    [(file, what)] = damages(store)
    assert file == D
    assert what == f"at file://{far}: is not what segments/r0/000001/manifest.json says"
    assert [a.did for a in repair(store.root, dry_run=True)] == [f"sent to file://{far} again"]
    assert damages(store) != []
    assert [a.file for a in repair(store.root)] == [D]
    assert damages(store) == []


def test_bytes_that_were_changed_there_do_not_come_here(store: Store, far: Path) -> None:
    flip(far / "r0/000001/D/c.0.0")
    drop(store)
    with pytest.raises(StoreDamaged, match=r"r0/000001/D/c.0.0 is not what its manifest says"):
        everything(store)
    assert not (store.root / D).exists()
    assert list(store.root.glob(".tmp-*")) == []
    [action] = [a for a in repair(store.root) if a.did == "set aside"]
    assert (action.file, action.ids) == ("segments/r0/000001", ("ada", "ben"))
    assert_has(Store.open(store.root), *ALL[2:])
    assert damages(store) == []
    assert (far / "r0/000001").exists(), "nothing is deleted"
    erase(store := Store.open(store.root), ["cleo"])
    assert not (far / "r0/000001").exists(), "but what an erasure might be about is"


def test_an_object_that_is_gone_is_told(store: Store, far: Path) -> None:
    (far / "r0/000001/D/c.0.0").unlink()
    assert damages(store) == [(D, f"at file://{far}: is gone")]
    drop(store)
    with pytest.raises(StoreDamaged, match="r0/000001/D/c.0.0 is gone; restore it there"):
        everything(store)


def test_a_flipped_byte_here_is_brought_again(store: Store) -> None:
    flip(store.root / D)
    manifests = [f"segments/r0/00000{number}/manifest.json" for number in (2, 3)]
    flip(store.root / manifests[0])
    (store.root / manifests[1]).unlink()
    assert [file for file, _ in damages(store)] == [D, *manifests]
    assert {a.did.split()[0] for a in repair(store.root)} == {"brought"}
    assert damages(store) == []
    assert_has(Store.open(store.root), *ALL)


def test_folders_that_are_lost_here_are_made_from_there(store: Store) -> None:
    want = everything(store)
    store.refresh()
    shutil.rmtree(store.root / "segments")
    shutil.rmtree(store.root / "published")
    (store.root / "catalog.duckdb").unlink()
    (store.root / "segments").mkdir()
    (store.root / "published").mkdir()
    repair(store.root)
    found = everything(Store.open(store.root))
    assert_all_equal(list(found.values()), list(want.values()))
    assert damages(store) == []


# -- whose place it is -------------------------------------------------------------------------


def test_what_is_gone_before_it_was_sent_is_told(sent: Store, tmp_path: Path) -> None:
    path = sent.root / "segments/r0/000001"
    shutil.copytree(path, path.with_name("000007"))
    (path.with_name("000007") / "D/c.0.0").unlink()
    with pytest.raises(StoreDamaged, match=r"000007/D/c.0.0 is gone before it was sent"):
        Store.open(sent.root)


def test_a_place_is_one_stores(store: Store, far: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreExists, match="already holds something"):
        Store.create(tmp_path / "other", elsewhere=Elsewhere(f"file://{far}"))
    assert not (tmp_path / "other").exists()
    (far / "store").write_text("another")
    before = contents(far)
    for change in (partial(write, store, ("gus",)), partial(compact, store)):
        with pytest.raises(StoreDamaged, match="does not say that the segments there are those"):
            change()
    assert contents(far) == before
    assert [file for file, _ in damages(store)] == ["gradstore.json"]
    flip(store.root / D)
    with pytest.raises(StoreDamaged, match="it has to hold"):
        repair(store.root)
    assert (store.root / D).exists(), "nothing was set aside"


def test_a_store_from_a_backup_overwrites_nothing(store: Store, far: Path, tmp_path: Path) -> None:
    shutil.copytree(store.root, tmp_path / "backup")
    write(store, ("fay",))
    before, store = contents(far), Store.open(tmp_path / "backup")
    with pytest.raises(StoreDamaged, match="another segments/r0/000004 already"):
        write(store, ("gus",))
    assert contents(far) == before


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("far", "is no URL of a folder"),
        ("s3://bucket/*", "is no URL of a folder"),
        ("simplecache::s3://bucket", "is no URL of a folder"),
        ("s3://key:secret@bucket/x", "has a password"),
        ("file:///{root}/store/segments", "lie in each other"),
        ("file:///{root}", "lie in each other"),
    ],
)
def test_urls_that_are_refused(tmp_path: Path, url: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Store.create(tmp_path / "store", elsewhere=Elsewhere(url.format(root=tmp_path)))
    assert not (tmp_path / "store").exists()


def test_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("init", tmp_path / "a", "--segments", f"file://{tmp_path}/far", "--cache-size", "2MB")
    assert Store.open(tmp_path / "a").format.elsewhere == Elsewhere(
        f"file://{tmp_path}/far", 2 << 20
    )
    assert (tmp_path / "far").stat().st_mode & 0o777 == 0o700
    assert "Protocol not known" in refused("init", tmp_path / "b", "--segments", "none://x/y")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    said = refused("init", tmp_path / "b", "--segments", "s3://bucket/x")
    assert "pip install s3fs" in said


def test_names_that_lead_out_of_a_folder_are_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Objects, "sizes", lambda *_: {"r0/000001/../../../x": 1})
    found = remote.of(store.root)
    assert found is not None
    with pytest.raises(StoreDamaged, match="that is no name"), found.copied(found.names()):
        pass
    with pytest.raises(StoreDamaged, match="where none can be"):
        found.remove("segments/../..")
    monkeypatch.setattr(Objects, "sizes", lambda *_: {"../../manifest.json": 1})
    assert list(found.unknown()) == [("segments/../..", False)], "a note, which repair leaves alone"


# -- other machines ----------------------------------------------------------------------------


def test_workers_fetch_by_url(store: Store, cache_of_workers: Path) -> None:
    from distributed import Client

    rows = store.rows('SELECT path, row_start, e."rows", token_start, tail_row FROM exposures e '
                      "JOIN segments USING (segment_id) ORDER BY path, row_start")  # fmt: skip
    names = sorted({path for path, *_ in rows})
    places = [[Place(*rest) for path, *rest in rows if path == name] for name in names]
    asked = record("cleo", tail=TAIL).gradient(ModelIdentity("x", 500, 16, 16, None, True))
    score = partial(score_segment, through=list(lenses([asked])))
    want = [score(store.root / name, of) for name, of in zip(names, places, strict=True)]
    sent = pickle.loads(pickle.dumps(anywhere(store, names)))
    assert [each.here() for each in sent] == [store.root / name for name in names]
    store.root.rename(store.root.with_name("on-another-machine"))
    with Client(processes=False, dashboard_address=None) as client:
        found = client.gather(client.map(score, sent, places, pure=False))
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other)
    assert len(list(cache_of_workers.glob("*/segments/r0/*/D/c.0.0"))) == 3
    flip(next(cache_of_workers.glob("*/segments/r0/000001/manifest.json")))
    assert torch.equal(score(sent[0], places[0]), want[0]), "another manifest is another segment"


def test_a_worker_lets_go_of_what_is_no_more_there(
    store: Store, far: Path, cache_of_workers: Path
) -> None:
    stated = replace(store.format, elsewhere=Elsewhere(far.as_uri(), 0))
    names = ["segments/r0/000001", "segments/r0/000002"]
    first, second = (
        replace(each, root=Path("/nowhere"), stated=stated)
        for each in anywhere(store, names)
        if isinstance(each, Distant)
    )
    path = first.here()
    assert SegmentReader(path).rows("D") > 0
    shutil.rmtree(far / "r0/000001")
    assert SegmentReader(second.here()).rows("D") > 0
    assert path.is_relative_to(cache_of_workers)
    assert not path.exists()


# -- S3 ----------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    reason = "wants `pip install s3fs 'moto[server]'`: 30 packages that nothing else here needs"
    s3fs = pytest.importorskip("s3fs", reason=reason)
    server = pytest.importorskip("moto.server", reason=reason).ThreadedMotoServer(port=0)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server.start()
    _, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    server.stop()


def test_s3(bucket: str, tmp_path: Path) -> None:
    store = create(tmp_path / "store", f"{bucket}/gradients")
    write(store, *BATCHES)
    drop(store)
    assert_has(store, *ALL)
    found = erase(store, ["ada"]).search
    assert found is not None
    assert found.hits == []
    assert {name[:9] for name in Objects(bucket).sizes()} == {"gradients"}
    names = {name[:9] for name in Objects(f"{bucket}/gradients").sizes()}
    assert names == {"store", "r0/000002", "r0/000003", "r0/000004"}
    assert damages(store) == []
    with pytest.raises(StoreExists):
        Store.create(tmp_path / "other", elsewhere=Elsewhere(f"{bucket}/gradients"))
    Objects(f"{bucket}/gradients").write("r0/000002/D/c.0.0", b"another")
    assert [file for file, _ in damages(store)] == ["segments/r0/000002/D/c.0.0"]
