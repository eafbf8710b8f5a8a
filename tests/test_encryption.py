"""An encrypted store: nothing of a record lies in clear, and a shredded key is the end of it."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from encrypted import KEY, Filled, create
from erased import IDS, row_of
from hypothesis import given, settings
from hypothesis import strategies as st
from records import RUN, assert_all_equal, record, records, tail
from tiny import digests, refused, run

from gradstore import Store
from gradstore.errors import EncryptionError, StoreDamaged, StoreExists
from gradstore.store import format, keys
from gradstore.store.manifest import MANIFEST, read_manifest
from gradstore.store.record import Record
from gradstore.store.sealed import open_array
from gradstore.store.sealed_rows import keys_at
from gradstore.store.segment import SegmentReader, pack, write_segment
from gradstore.upkeep.repair import repair
from gradstore.upkeep.verify import verify

OTHER = bytes(32)
pytest_plugins = ["encrypted"]
pytestmark = pytest.mark.usefixtures("master_key")


def write(root: Path, batch: list[Record], profile: str = "packed") -> Path:
    """One segment of records, without a catalog."""
    arrays, tables = pack(batch)
    into = root / "segments" / "r0"
    return write_segment(
        into, run={"run_id": 1}, kind="gradients", profile=profile, arrays=arrays, tables=tables
    )


def read(path: Path, batch: list[Record]) -> list[Record]:
    """The same records from the segment at a path."""
    _, tables = pack(batch)
    columns = tables["exposures"]
    names = ("row_start", "rows", "token_start", "tail_row")
    reader = SegmentReader(path)
    return [
        reader.record(one.exposure, {name: columns[name][n] for name in names})
        for n, one in enumerate(batch)
    ]


# -- what is sealed ------------------------------------------------------------------------------


SHAPES = st.lists(st.tuples(st.integers(1, 90), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=5)
@given(SHAPES, st.sampled_from(format.PROFILES), st.data())
def test_any_record_comes_back_and_no_byte_of_it_is_seen(
    shapes: list[tuple[int, bool]], profile: str, data: st.DataObject
) -> None:
    width = data.draw(st.sampled_from([5, 16, 300]))
    batch = [
        record(f"person-{n}@example.org", rows=rows, width=width, epoch=1 + repeated)
        for n, (rows, repeated) in enumerate(shapes)
    ]
    with tempfile.TemporaryDirectory() as folder:
        store = create(Path(folder, "store"), profile)
        path = write(store.root, batch, profile)
        got = read(path, batch)
        for one, want in zip(got, batch, strict=True):
            assert one.tokens.tolist() == want.tokens.tolist()
            assert one.scored.tolist() == want.scored.tolist()
            if profile != "small":
                assert torch.equal(one.D, want.D)
        everywhere = {file: file.read_bytes() for file in store.root.rglob("*") if file.is_file()}
        for one in batch:
            secrets = [one.exposure.id.encode(), row_of(one.D)]
            if len(one.tokens) > 4:
                secrets += [
                    one.tokens.to(kind).numpy().tobytes() for kind in (torch.uint16, torch.int32)
                ]
            for secret in secrets:
                assert [f for f, held in everywhere.items() if secret in held] == []
            with pytest.raises(StoreDamaged, match="rows 7:3 of"):
                SegmentReader(path).tensor("D", 7, 3)


def test_any_rows_of_an_array_are_those_of_the_whole(unfilled: Store) -> None:
    batch = records("a", "b", "c", rows=90, width=2000)
    path = write(unfilled.root, batch)
    reader, array = SegmentReader(path), open_array(path, "D", keys_at(path))
    whole = torch.cat([one.D for one in batch])
    for start, stop in ((0, 0), (0, 1), (89, 91), (60, 70), (33, 200), (270, 270), (0, 270)):
        assert torch.equal(reader.tensor("D", start, stop), whole[start:stop])
    for size in (1, 200_000, 1 << 30):  # a row is 4,000 bytes, a message at most 49 rows
        blocks = [torch.from_numpy(block.view("int16")) for block in array.blocks(size)]
        assert torch.equal(torch.cat(blocks).view(torch.bfloat16), whole)
        assert all(block.nbytes <= max(size, 49 * 4000) for block in blocks)


def test_reading_on_opens_each_message_once(
    unfilled: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = write(unfilled.root, records("a", "b", rows=90, width=2000)), list[str]()
    held = keys_at(path)
    assert held is not None
    array, open_into = open_array(path, "D", held), held.open_into

    def counted(slot: int, what: str, *rest: Any) -> None:
        opened.append(what)
        open_into(slot, what, *rest)

    monkeypatch.setattr(held, "open_into", counted)
    whole = array.rows(0, 180)
    messages, parts = opened.copy(), [array.rows(at, min(at + 7, 180)) for at in range(0, 180, 7)]
    assert b"".join(map(bytes, parts)) == bytes(whole)
    assert opened == 2 * messages
    array.close()  # forgets what it had open
    array.rows(178, 180)
    assert opened == [*messages, *messages, messages[-1]]


def test_each_record_of_each_segment_has_a_key_of_its_own(filled_sealed: Filled) -> None:
    store, _ = filled_sealed
    found = b"".join(file.read_bytes()[64:] for _, file in keys.files_of(store.root))
    wrapped = [found[at + 16 : at + 64] for at in range(0, len(found), keys.SLOT)]
    assert len(wrapped) == len(set(wrapped)) > len(IDS)
    files = [file for file in store.root.rglob("*") if file.is_file()]
    assert KEY not in b"".join(file.read_bytes() for file in files)
    outside = b"".join(file.read_bytes() for file in files if "keys" not in file.parts)
    assert not any(key[:32] in outside for key in wrapped), "a backup without keys/ has none"


def test_the_documented_reader_reads_it(unfilled: Store) -> None:
    page = Path(__file__).parents[1] / "docs" / "store-format.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    [code] = [block for block in blocks if "AESGCM" in block]
    names: dict[str, Any] = {}
    exec(compile(code, str(page), "exec"), names)
    batch = records("first", "second", rows=90, width=700)
    for number, profile in enumerate(("packed", "raw"), 1):
        write(unfilled.root, batch, profile)
        found = names["unsealed"](unfilled.root, f"segments/r0/00000{number}", "D", KEY)
        want = torch.cat([one.D for one in batch]).view(torch.uint16)
        assert found.tolist() == want.tolist()


# -- tampering -----------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["packed", "raw"])
def test_any_flipped_byte_is_refused(unfilled: Store, profile: str) -> None:
    batch = records("first", "second", rows=3, width=8, tail=tail())
    path = write(unfilled.root, batch, profile)
    tried = 0
    sealed = [*path.rglob("c.0"), keys.path_of(unfilled.root, "segments/r0/000001")]
    for file in sealed:
        held = file.read_bytes()
        size = len(held)
        if file.name == "c.0":
            said = json.loads((file.parent / "zarr.json").read_text())
            size = sum(said["attributes"]["sealed"]["bytes"])
        slots = range(64, 64 + 2 * keys.SLOT, 5) if file is sealed[-1] else range(0, size, 9)
        for at in slots:
            file.write_bytes(held[:at] + bytes([held[at] ^ 4]) + held[at + 1 :])
            with pytest.raises(StoreDamaged, match="is not what was"):
                read(path, batch)
            tried += 1
        file.write_bytes(held)
    assert_all_equal(read(path, batch), batch)
    assert tried > 100


def test_what_is_in_another_place_is_refused(unfilled: Store) -> None:
    batch = records("first", "second", rows=3, width=8)
    path = write(unfilled.root, batch, "raw")
    other = write(unfilled.root, batch, "raw")
    file = path / "D" / "c.0"
    held = file.read_bytes()
    half = 28 + 3 * 8 * 2  # of equal length: a message for each record
    file.write_bytes(held[half : 2 * half] + held[:half] + held[2 * half :])
    with pytest.raises(StoreDamaged, match=r"segments/r0/000001: D is not what was sealed there"):
        read(path, batch)
    file.write_bytes((other / "D" / "c.0").read_bytes())
    with pytest.raises(StoreDamaged, match="sealed there"):
        read(path, batch)
    file.write_bytes(held)
    slots = keys.path_of(unfilled.root, "segments/r0/000001")
    was = slots.read_bytes()
    slots.write_bytes(was[:64] + was[128:192] + was[64:128] + was[192:])
    with pytest.raises(StoreDamaged, match="slot 0 of the keys of segments/r0/000001"):
        read(path, batch)
    slots.write_bytes(keys.path_of(unfilled.root, "segments/r0/000002").read_bytes())
    with pytest.raises(StoreDamaged, match="slot 0"):
        read(path, batch)


def test_rows_of_a_manifest_are_refused_where_one_is_not_what_was_sealed(unfilled: Store) -> None:
    path = write(unfilled.root, records("first", "second", rows=3, width=8))
    file = path / MANIFEST
    was = json.loads(file.read_text())
    sealed = was["tables"]["exposures"]["sealed"]
    assert read_manifest(path)["tables"]["exposures"]["id"] == ["first", "second"]
    flipped = sealed[0][:30] + ("A" if sealed[0][30] != "A" else "B") + sealed[0][31:]
    for forged in (flipped, sealed[0][:-8], sealed[1]):
        said = json.loads(json.dumps(was))
        said["tables"]["exposures"]["sealed"] = [forged, sealed[1]]
        file.write_text(json.dumps(said))
        with pytest.raises(StoreDamaged, match="exposures.*is not what was sealed there"):
            read_manifest(path)
    said = json.loads(json.dumps(was))
    said["tables"]["exposures"]["columns"].reverse()
    file.write_text(json.dumps(said))
    with pytest.raises(StoreDamaged, match="exposures.*is not what was sealed there"):
        read_manifest(path)


def test_what_is_not_sealed_is_refused(unfilled: Store, tmp_path: Path) -> None:
    batch = records("first", "second", rows=3, width=8)
    path, plain = write(unfilled.root, batch), Store.create(tmp_path / "plain").root
    clear = write(plain, batch)
    shutil.rmtree(path / "D")
    shutil.copytree(clear / "D", path / "D")
    with pytest.raises(StoreDamaged, match="D is not sealed, as all is in an encrypted store"):
        read(path, batch)
    shutil.copyfile(clear / "manifest.json", path / "manifest.json")
    unfilled.begin_run(RUN)
    with pytest.raises(StoreDamaged, match="is not sealed"):
        unfilled.recover()
    shutil.rmtree(unfilled.root / "keys")
    for reading in (Store.open, verify, repair):
        with pytest.raises(EncryptionError, match="is encrypted, and its folder keys is not there"):
            reading(unfilled.root)
    assert path.exists(), "it can be read again when they are back"


def test_verify_finds_damage_of_what_is_sealed(filled_sealed: Filled) -> None:
    store, _ = filled_sealed
    assert [f for f in verify(store.root) if f.damage] == []
    slots = keys.path_of(store.root, "segments/r0/000001")
    held = bytearray(slots.read_bytes())
    held[64 + 20] ^= 1
    slots.write_bytes(held)
    found = [f for f in verify(store.root) if f.damage]
    assert {f.file.split("/")[2] for f in found} == {"000001"}
    assert "slot 0 of the keys" in found[0].what
    slots.unlink()
    assert "without them nobody can read it" in next(f for f in verify(store.root) if f.damage).what
    old = keys.path_of(store.root, "segments/r0/009999")  # of a segment that is long gone
    old.write_bytes(held)
    [note] = [f for f in verify(store.root) if "009999" in f.file]
    assert note.what.startswith("serves backups alone, and is damaged: slot 0 of the keys")


# -- the master key ------------------------------------------------------------------------------


def test_without_the_key_nothing_is_read_and_nothing_changes(
    filled_sealed: Filled, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store, _ = filled_sealed
    store.refresh()
    before = digests(store.root)
    monkeypatch.delenv("GRADSTORE_KEY")
    commands: list[list[object]] = [
        ["list"], ["stats"], ["show", IDS[1]], ["sql", "SELECT 1"], ["erase", IDS[0], "--yes"],
        ["compact"], ["verify"], ["verify", "--repair"], ["export", "out", "--gradients"],
    ]  # fmt: skip
    for name, *rest in commands[:8]:
        said = refused(name, *rest, "-s", store.root)
        assert "is encrypted, and there is no master key" in said
        assert f"GRADSTORE_KEY_FILE=FILE gradstore stats -s {store.root}" in said
    monkeypatch.setenv("GRADSTORE_KEY", OTHER.hex())
    assert "GRADSTORE_KEY gives another master key" in refused("list", "-s", store.root)
    monkeypatch.setenv("GRADSTORE_KEY", "secret")
    assert "32 random bytes in hex or base64" in refused("list", "-s", store.root)
    monkeypatch.setenv("GRADSTORE_KEY_FILE", str(tmp_path / "gone"))
    assert "gone cannot be read: No such file" in refused("list", "-s", store.root)
    with pytest.raises(EncryptionError):
        SegmentReader(store.root / "segments" / "r0" / "000001").tensor("D")
    assert {k: v for k, v in digests(store.root).items() if "lock" not in k} == {
        k: v for k, v in before.items() if "lock" not in k
    }


def test_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADSTORE_KEY")
    root, file = tmp_path / "store", tmp_path / "master.key"
    assert "--key-file FILE" in run("init", root, "--encrypt", code=2).stderr
    inside = run("init", root, "--encrypt", "--key-file", root / "key", code=2).stderr
    assert "keep the key elsewhere" in inside
    assert not root.exists()
    assert "give --encrypt too" in run("init", root, "--key-file", file, code=2).stderr
    said = run("init", root, "--encrypt", "--key-file", file).stderr
    assert f"export GRADSTORE_KEY_FILE={file}" in said
    assert (len(file.read_text()), file.stat().st_mode & 0o777) == (65, 0o600)
    assert "no master key" in refused("verify", "-s", root)
    monkeypatch.setenv("GRADSTORE_KEY_FILE", str(file))
    assert Store.open(root).format.encryption is not None
    assert format.load(root).format == format.LATER
    run("init", tmp_path / "second", "--encrypt")  # by the environment, with the same key
    with pytest.raises(StoreExists):
        create(root)
    (tmp_path / "text").write_text("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n")
    assert keys.read_file(tmp_path / "text") == KEY
