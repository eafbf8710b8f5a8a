"""A store that somebody made to do harm is refused with an error that names the file and value."""

import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import RUN, records, tail
from test_arrays import places

from gradstore import Store
from gradstore.errors import GradstoreError, StoreDamaged, StoreError
from gradstore.store import catalog, database
from gradstore.store.arrays import ZarrArray, write_array
from gradstore.store.files import BLOCK_BYTES
from gradstore.store.manifest import MANIFEST, read_manifest
from gradstore.store.segment import SegmentReader
from gradstore.store.writer import SegmentWriter
from gradstore.upkeep.verify import verify

SEGMENT = "segments/r0/000001"
BIG = st.sampled_from([-1, 0, 1, 7, 2**31, 2**47, 2**62, 2**63, 2**64, 10**30])
TEXT = st.sampled_from(["", "..", "/etc/passwd", "../x", "a\x00b", "\udc80", "x" * 5000, "'; --"])
ANY: st.SearchStrategy[Any] = st.one_of(
    BIG, TEXT, st.sampled_from([None, True, 0.5, float("nan"), float("inf"), [], {}, [[]], [-1]])
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = Store.create(tmp_path_factory.mktemp("hostile") / "store", dtype="float32")
    into = SegmentWriter(store, lambda: store.begin_run(RUN))
    into.put(records("a", "b", tail=tail()))
    into.close()
    store.refresh()
    return store.root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "store")


def change(file: Path, path: tuple[Any, ...], value: Any) -> None:
    """Set one value in a JSON document."""
    document = inner = json.loads(file.read_text())
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(document))


def read_all(root: Path) -> None:
    with Store.open(root) as store:
        for one in store.records([1, 2], 1):
            assert one.nbytes


# -- links and paths -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["gradstore.json", "segments", "segments/r0", SEGMENT, f"{SEGMENT}/{MANIFEST}",
     f"{SEGMENT}/D", f"{SEGMENT}/D/zarr.json", f"{SEGMENT}/D/c.0.0"],
)  # fmt: skip
def test_no_link_is_followed(root: Path, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    os.rename(root / name, elsewhere)
    (root / name).symlink_to(elsewhere)
    if name.endswith(MANIFEST):
        with pytest.raises(StoreDamaged, match="is a symbolic link"):
            read_manifest(root / SEGMENT)
    else:
        with pytest.raises(StoreDamaged, match="is a symbolic link"):
            read_all(root)
    assert any(f.damage and "symbolic link" in f.what for f in verify(root))


@pytest.mark.parametrize(
    "name", ["catalog.lock", "catalog.duckdb", "published", "segments/r0/lock"]
)
def test_nothing_is_written_through_a_link(root: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    os.rename(root / name, outside)
    (root / name).symlink_to(outside)
    before = outside.read_bytes() if outside.is_file() else sorted(outside.iterdir())
    with pytest.raises(StoreDamaged, match="is a symbolic link"):  # noqa: PT012
        store = Store(root, Store.open(root).format)
        SegmentWriter(store, lambda: store.begin_run(RUN)).close()
    assert before == (outside.read_bytes() if outside.is_file() else sorted(outside.iterdir()))


@pytest.mark.parametrize(
    "path", ["../../x", "/etc", "segments/r0/../../..", "segments/r0", "", "segments/r0/000001/D"]
)
def test_a_segment_lies_among_segments(root: Path, path: str) -> None:
    with catalog.transaction(root) as connection:
        connection.execute("UPDATE segments SET path = ?", [path])
    with Store(root, Store.open(root).format) as store, pytest.raises(StoreDamaged) as refused:
        store.segment(1)
    assert repr(path) in str(refused.value)


@pytest.mark.parametrize("name", ["../D", "/etc/passwd", "..", "", "a\x00b"])
def test_an_array_has_a_name_and_no_path(root: Path, name: str) -> None:
    with pytest.raises(StoreDamaged, match="no array"):
        SegmentReader(root / SEGMENT).tensor(name)


# -- sizes ---------------------------------------------------------------------------------------


@pytest.fixture
def array(tmp_path: Path) -> Path:
    write_array(tmp_path / "array", np.zeros((300, 200), "uint16"), "packed")
    return tmp_path / "array"


def reshape(folder: Path, rows: int, columns: int) -> None:
    change(folder / "zarr.json", ("shape",), [rows, columns])


@pytest.mark.parametrize("shape", [(300, 10**9), (10**12, 200), (-1, 200), (300, -200)])
def test_a_shape_that_its_bytes_cannot_hold(array: Path, shape: tuple[int, int]) -> None:
    reshape(array, *shape)
    with pytest.raises(StoreDamaged, match="array is not a readable array"):
        ZarrArray(array)


def test_zeros_are_no_bomb(tmp_path: Path) -> None:
    """What compresses best is within the limit."""
    write_array(tmp_path / "zeros", np.zeros((5000, 64), "float32"), "packed")
    assert not ZarrArray(tmp_path / "zeros").read().any()


@pytest.mark.parametrize(("at", "value"), [(4, 2**31 - 1), (12, 2**31 - 1), (12, 16), (4, 0)])
def test_a_chunk_that_says_it_is_huge(array: Path, at: int, value: int) -> None:
    shard = array / "c.0.0"
    content = bytearray(shard.read_bytes())
    content[at : at + 4] = struct.pack("<I", value)
    shard.write_bytes(content)
    with pytest.raises(StoreDamaged, match="a chunk is short"):
        ZarrArray(array).rows(0, 1)


@pytest.mark.parametrize(
    "entry", [(0, 2**50), (2**50, 10), (2**64 - 2, 10), (0, 2**64 - 1), (100, 2**63)]
)
def test_an_index_that_leads_out_of_the_file(array: Path, entry: tuple[int, int]) -> None:
    shard = array / "c.0.0"
    content = shard.read_bytes()
    index = struct.pack("<QQ", *entry) + content[-36:-4]
    assert len(index) == 16 * 3
    sealed = index + google_crc32c.value(index).to_bytes(4, "little")
    shard.write_bytes(content[:-52] + sealed)
    with pytest.raises(StoreDamaged, match="not a readable array"):
        ZarrArray(array)


@pytest.mark.parametrize("kind", ["object", "O", "S1000000000", "complex128", "float128"])
def test_types_that_are_not_numbers(array: Path, kind: str) -> None:
    change(array / "zarr.json", ("data_type",), kind)
    with pytest.raises(StoreDamaged, match="data_type"):
        ZarrArray(array)


@pytest.mark.parametrize(
    "name", ["gradstore.json", f"{SEGMENT}/{MANIFEST}", f"{SEGMENT}/D/zarr.json"]
)
@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 200_000, None])
def test_json_that_is_none_too_deep_or_too_long(
    root: Path, name: str, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("format.MOST_BYTES", "manifest.MOST_BYTES", "arrays.METADATA_BYTES"):
        monkeypatch.setattr(f"gradstore.store.{module}", 2 * BLOCK_BYTES)
    path = root / name
    path.write_bytes(b" " * (2 * BLOCK_BYTES + 1) if content is None else content)
    with pytest.raises(StoreDamaged, match=path.name if path.name != "zarr.json" else "D"):
        read_manifest(root / SEGMENT) if name.endswith(MANIFEST) else read_all(root)
    assert any(f.damage and name.startswith(f.file.removesuffix("/D")) for f in verify(root))


# -- fuzz ----------------------------------------------------------------------------------------


def spots(file: Path) -> list[tuple[Any, ...]]:
    return list(places(json.loads(file.read_text())))


def kept(*files: Path) -> Iterator[None]:
    """Put files back as they were."""
    was = [(file, file.read_bytes()) for file in files]
    yield
    for file, content in was:
        file.write_bytes(content)


@settings(max_examples=150)
@given(data=st.data())
def test_any_value_in_a_manifest(made: Path, data: st.DataObject) -> None:
    file = made / SEGMENT / MANIFEST
    for _ in kept(file):
        change(file, data.draw(st.sampled_from(spots(file))), data.draw(ANY))
        with suppress(StoreError):
            commit(read_manifest(made / SEGMENT))


CONNECTION: list[catalog.Connection] = []


def commit(manifest: dict[str, Any]) -> None:
    """Enter a manifest into an empty catalog."""
    import duckdb

    if not CONNECTION:
        CONNECTION.append(duckdb.connect())
        database.migrate(CONNECTION[0])
    connection = CONNECTION[0]
    connection.execute("BEGIN")
    try:
        catalog.commit_segment(connection, SEGMENT, manifest)
    finally:
        connection.execute("ROLLBACK")


@settings(max_examples=300)
@given(data=st.data())
def test_any_value_in_an_arrays_metadata(made: Path, data: st.DataObject) -> None:
    file = made / SEGMENT / data.draw(st.sampled_from(["D", "tokens", "tail"])) / "zarr.json"
    for _ in kept(file):
        change(file, data.draw(st.sampled_from(spots(file))), data.draw(ANY))
        with suppress(StoreError):
            assert ZarrArray(file.parent).read().nbytes < 1 << 24


@settings(max_examples=60)
@given(data=st.data())
def test_any_value_in_the_description(made: Path, data: st.DataObject) -> None:
    file = made / "gradstore.json"
    for _ in kept(file):
        change(file, data.draw(st.sampled_from(spots(file))), data.draw(ANY))
        with suppress(StoreError):
            Store.open(made)


@settings(max_examples=8)
@given(data=st.data())
def test_any_value_in_the_catalog(made: Path, data: st.DataObject) -> None:
    columns = ("row_start", "rows", "token_start", "tail_row", "segment_id", "run_id", "sample_id")
    column = data.draw(st.sampled_from(columns))
    value = data.draw(st.sampled_from([-(2**31), -1, 3, 10**6, 2**31 - 1]))
    files = [made / catalog.NAME, *made.glob("published/*")]
    before = {file: file.read_bytes() for file in files}
    try:
        with catalog.transaction(made) as connection:
            connection.execute(f'UPDATE exposures SET "{column}" = {value} WHERE sample_id = 1')
        with suppress(GradstoreError):
            read_all(made)
        assert any(finding.damage for finding in verify(made))
    finally:
        shutil.rmtree(made / "published")
        (made / "published").mkdir()
        for file, content in before.items():
            file.write_bytes(content)


@pytest.mark.parametrize(
    "table", ["x; DROP TABLE samples; --", "samples", "migrations", "requests"]
)
def test_a_manifest_fills_only_its_own_tables(root: Path, table: str) -> None:
    change(root / SEGMENT / MANIFEST, ("tables", table), {"sample_id": [1]})
    with pytest.raises(StoreDamaged, match="no table"):
        read_manifest(root / SEGMENT)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("files", "../../../etc/passwd"), {"bytes": 1, "sha256": "0" * 64}),
        (("files", "/etc/passwd"), {"bytes": 1, "sha256": "0" * 64}),
        (("files", "D/zarr.json"), {"bytes": 1, "blake3": "0" * 63}),
        (("files", "D/zarr.json"), {"bytes": 1, "crc32": "0" * 64}),
        (("files", "D/zarr.json"), {"bytes": 1, "blake3": "0" * 64, "sha256": "0" * 64}),
        (("tables", "exposures", "rows", 0), float("nan")),
        (("tables", "exposures", "row_start", 1), -5),
        (("tables", "exposures", "tokens"), [3]),
        (("segment", "run_id"), "1; DROP TABLE runs"),
    ],
)
def test_what_a_manifest_cannot_say(root: Path, path: tuple[Any, ...], value: object) -> None:
    change(root / SEGMENT / MANIFEST, path, value)
    with pytest.raises(StoreDamaged, match=r"manifest\.json is damaged"):
        read_manifest(root / SEGMENT)
