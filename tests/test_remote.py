"""Stores whose segments lie elsewhere: the same promises, whatever the file system there does."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_writer import SENDING
from records import RUN, assert_all_equal, record, records, tail
from tiny import refused, run
from victims import Victims, everything

from gradstore import Store
from gradstore.errors import SettingsError, StoreDamaged, StoreExists, StoreUnreachable
from gradstore.influence.scan import Place, lenses, score_segment
from gradstore.store import ModelIdentity, remote
from gradstore.store.compact import compact
from gradstore.store.distant import Distant, anywhere
from gradstore.store.erase import erase
from gradstore.store.format import Elsewhere
from gradstore.store.objects import Objects
from gradstore.store.repair import repair
from gradstore.store.verify import verify
from gradstore.store.writer import SegmentWriter

TAIL = tail()
BATCHES = (("ada", "ben"), ("cleo", "dora"), ("emil",))
ALL = [id for batch in BATCHES for id in batch]
D = "segments/r0/000001/D/c/0/0"


@pytest.fixture(autouse=True)
def cache_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADSTORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def create(root: Path, url: str, cache_bytes: int = 1 << 30) -> Store:
    store = Store.create(root, elsewhere=Elsewhere(url, cache_bytes))
    store.begin_run(RUN)
    return store


def write(store: Store, *batches: tuple[str, ...]) -> None:
    into = SegmentWriter(store, store.run())
    try:
        for ids in batches:
            into.put(records(*ids, tail=TAIL))
            into.flush()
    finally:
        into.abandon()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    write(create(folder / "store", f"file://{folder}/far"), *BATCHES)
    return folder


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Store:
    """A store of three segments that are here and at ``far``."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "store" / "gradstore.json").read_text()
    (tmp_path / "store" / "gradstore.json").unlink()
    moved = text.replace(str(template), str(tmp_path))
    (tmp_path / "store" / "gradstore.json").write_text(moved)
    made = Store.open(tmp_path / "store")
    made.format.save(made.root)
    return made


@pytest.fixture
def far(store: Store) -> Path:
    return store.root.parent / "far"


def shards(folder: Path) -> list[Path]:
    return [path for path in folder.glob("segments/r*/*/*/c/**/0") if path.is_file()]


def drop(store: Store) -> None:
    """Forget all arrays that are here."""
    for path in shards(store.root):
        path.unlink()
    store.refresh()


def there(far: Path) -> dict[str, bytes]:
    return {str(p.relative_to(far)): p.read_bytes() for p in far.rglob("*") if p.is_file()}


def damages(store: Store) -> list[tuple[str, str]]:
    return [(f.file, f.what) for f in verify(store.root) if f.damage]


def assert_has(store: Store, *ids: str) -> None:
    numbers = [n for (n,) in store.rows("SELECT DISTINCT sample_id FROM exposures ORDER BY ALL")]
    assert_all_equal(list(store.records(numbers, 1)), records(*ids, tail=TAIL))


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
    assert [bool(list(path.glob("D/c/0/0"))) for path in (one, two, three)] == [True, False, True]
    assert_has(store, *ALL)  # brings what is needed


def test_one_segment_may_be_larger_than_the_cache(store: Store) -> None:
    shorten(store, 1).evict()
    assert shards(store.root) == []
    assert_has(store, *ALL)
    assert {path.relative_to(store.root).parts[2] for path in shards(store.root)} == {"000003"}
    assert damages(store) == []


def test_what_is_not_there_whole_is_never_dropped(store: Store, far: Path) -> None:
    (far / "r0/000001/manifest.json").unlink()
    (far / "r0/000002/D/c/0/0").write_bytes(b"short")
    shorten(store, 1).evict()
    assert {path.relative_to(store.root).parts[2] for path in shards(store.root)} == {
        "000001",
        "000002",
    }


# -- crashes and networks ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Victims, Path]]:
    root = tmp_path_factory.mktemp("killed") / "store"
    running = Victims(root)
    yield running, root
    running.close()


def test_a_killed_sender_loses_nothing(victims: tuple[Victims, Path]) -> None:
    running, root = victims
    far, known = root.parent / "far", ["before"]
    store = create(root, f"file://{far}")
    write(store, ("before",))
    for number, point in enumerate(SENDING):
        assert running.run(writers={"0": f"killed-{number}"}, point=point) == set()
        entered = set(everything(Store(root, store.format)))
        assert entered == set(known), "nothing is visible before it is there"
        again = Store.open(root)
        assert again.is_current()
        new = [id for id in everything(again) if id not in known]
        assert new, "what was renamed is finished"
        known += new
        assert {name[:9] for name in there(far)} - {"store"} == {
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


# -- erasing -----------------------------------------------------------------------------------


def test_what_is_erased_is_gone_there_too(store: Store, far: Path, cache_of_workers: Path) -> None:
    [worker] = anywhere(store.root, ["segments/r0/000001"])
    assert isinstance(worker, Distant)
    cached = Distant(Path("/nowhere"), worker.name, worker.digest, worker.stated).here()
    assert cached.is_relative_to(cache_of_workers)
    row = record("ada", tail=TAIL).D[0].view(torch.int16).numpy().tobytes()
    compact(store, profile="raw")
    assert any(row in bytes for bytes in there(far).values())
    drop(store)
    found = erase(store, ["ada"]).search
    assert found is not None
    assert found.hits == []
    for bytes in [*there(far).values(), *there(store.root).values()]:
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


# -- damage ------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)


def test_a_flipped_byte_there_is_found_and_mended(store: Store, far: Path) -> None:
    flip(far / "r0/000001/D/c/0/0")
    [(file, what)] = damages(store)
    assert file == D
    assert what == f"at file://{far}: is not what segments/r0/000001/manifest.json says"
    assert [a.did for a in repair(store.root, dry_run=True)] == [f"sent to file://{far} again"]
    assert damages(store) != []
    assert [a.file for a in repair(store.root)] == [D]
    assert damages(store) == []


def test_bytes_that_were_changed_there_do_not_come_here(store: Store, far: Path) -> None:
    flip(far / "r0/000001/D/c/0/0")
    drop(store)
    with pytest.raises(StoreDamaged, match=r"r0/000001/D/c/0/0 is not what its manifest says"):
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
    (far / "r0/000001/D/c/0/0").unlink()
    assert damages(store) == [(D, f"at file://{far}: is gone")]
    drop(store)
    with pytest.raises(StoreDamaged, match="r0/000001/D/c/0/0 is gone; restore it there"):
        everything(store)


def test_a_flipped_byte_here_is_brought_again(store: Store) -> None:
    flip(store.root / D)
    flip(store.root / "segments/r0/000002/manifest.json")
    assert [file for file, _ in damages(store)] == [D, "segments/r0/000002/manifest.json"]
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


def test_a_place_is_one_stores(store: Store, far: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreExists, match="already holds something"):
        Store.create(tmp_path / "other", elsewhere=Elsewhere(f"file://{far}"))
    assert not (tmp_path / "other").exists()
    (far / "store").write_text("another")
    before = there(far)
    for change in (partial(write, store, ("gus",)), partial(compact, store)):
        with pytest.raises(StoreDamaged, match="does not say that the segments there are those"):
            change()
    assert there(far) == before
    assert [file for file, _ in damages(store)] == ["gradstore.json"]
    flip(store.root / D)
    with pytest.raises(StoreDamaged, match="it has to hold"):
        repair(store.root)
    assert (store.root / D).exists(), "nothing was set aside"


def test_a_store_from_a_backup_overwrites_nothing(store: Store, far: Path, tmp_path: Path) -> None:
    shutil.copytree(store.root, tmp_path / "backup")
    write(store, ("fay",))
    before, store = there(far), Store.open(tmp_path / "backup")
    with pytest.raises(StoreDamaged, match="another segments/r0/000004 already"):
        write(store, ("gus",))
    assert there(far) == before


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("far", "is no URL of a folder"),
        ("s3://bucket/*", "is no URL of a folder"),
        ("simplecache::s3://bucket", "is no URL of a folder"),
        ("s3://key:secret@bucket/x", "has a password"),
        ("file:///{root}/store/segments", "lies in the store itself"),
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
    sent = pickle.loads(pickle.dumps(anywhere(store.root, names)))
    assert [each.here() for each in sent] == [store.root / name for name in names]
    store.root.rename(store.root.with_name("on-another-machine"))
    with Client(processes=False, dashboard_address=None) as client:
        found = client.gather(client.map(score, sent, places, pure=False))
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other)
    assert len(list(cache_of_workers.glob("*/segments/r0/*/D/c/0/0"))) == 3
    flip(next(cache_of_workers.glob("*/segments/r0/000001/manifest.json")))
    assert torch.equal(score(sent[0], places[0]), want[0]), "another manifest is another segment"


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
    Objects(f"{bucket}/gradients").write("r0/000002/D/c/0/0", b"another")
    assert [file for file, _ in damages(store)] == ["segments/r0/000002/D/c/0/0"]
