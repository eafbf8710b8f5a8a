"""A segment gives back the records it was made of, and its manifest tells the truth about it."""

import json
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from records import KEPT, RUN, WIDTH, assert_all_equal, record, records, tail
from torch import Tensor
from xxhash import xxh3_128

from gradstore.errors import StoreDamaged
from gradstore.store.format import PROFILES
from gradstore.store.manifest import MANIFEST, read_manifest, segment_paths
from gradstore.store.record import Exposure, Record
from gradstore.store.segment import (
    SegmentReader,
    collect_garbage,
    pack,
    write_segment,
)

LENGTHS = [3, 1, 200, 0, 7, 128]  # rows; a text of one token has none
ROOT_RUN = {**RUN, "run_id": 1}


def write(folder: Path, batch: list[Record], profile: str = "packed") -> Path:
    """One segment of gradients."""
    made, tables = pack(batch)
    return write_segment(
        folder, run=ROOT_RUN, kind="gradients", profile=profile, arrays=made, tables=tables
    )


def batch_of(dtype: torch.dtype, vocabulary: int, sides: str) -> list[Record]:
    """Records of all lengths; with both sides, of two micro-batches with a tail each."""
    tails: list[Tensor | None] = [None] * len(LENGTHS)
    if sides == "both":
        first, second = tail("first", vocabulary), tail("second", vocabulary)
        tails = [first, first, second, first, second, second]
    return [
        record(f"{n}", rows=rows, vocabulary=vocabulary, dtype=dtype, tail=shared)
        for n, (rows, shared) in enumerate(zip(LENGTHS, tails, strict=True))
    ]


def read_all(path: Path) -> list[Record]:
    """Every record, located by the table in the manifest as by the catalog's."""
    table = read_manifest(path)["tables"]["exposures"]
    names = [field.name for field in fields(Exposure)]
    reader, found = SegmentReader(path), []
    for row in range(len(table["id"])):
        place = {name: column[row] for name, column in table.items()}
        found.append(reader.record(Exposure(**{name: place[name] for name in names}), place))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("vocabulary", [500, 70_000])
@pytest.mark.parametrize("sides", ["input", "both"])
@pytest.mark.parametrize("profile", ["packed", "raw"])  # small loses a little: test_quantize
def test_round_trip(
    tmp_path: Path, dtype: torch.dtype, vocabulary: int, sides: str, profile: str
) -> None:
    batch = batch_of(dtype, vocabulary, sides)
    assert_all_equal(read_all(write(tmp_path, batch, profile)), batch)


@pytest.mark.parametrize(("largest", "stored"), [(65_535, "uint16"), (65_536, "int32")])
def test_token_ids_take_two_bytes_where_they_fit(tmp_path: Path, largest: int, stored: str) -> None:
    one = record("a", rows=3, tail=tail())
    one.tokens[1] = largest
    assert one.output is not None
    one.output.index[2, 0] = largest
    path = write(tmp_path, [one])
    group = zarr.open_group(path, mode="r")
    for name in ("tokens", "R_index"):
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert array.dtype == stored
    assert_all_equal(read_all(path), [one])


def test_a_tail_is_stored_once_for_all_that_share_it(tmp_path: Path) -> None:
    path = write(tmp_path, batch_of(torch.bfloat16, 500, "both"))
    assert SegmentReader(path).tensor("tail").shape == (2, 500)
    assert read_manifest(path)["tables"]["exposures"]["tail_row"] == [0, 0, 1, 0, 1, 1]


def test_zarr_python_opens_it(tmp_path: Path) -> None:
    batch = batch_of(torch.bfloat16, 500, "both")
    group = zarr.open_group(write(tmp_path, batch), mode="r")
    rows = sum(LENGTHS)
    shapes = {
        "tokens": (rows + len(LENGTHS),),
        "scored": (rows,),
        "D": (rows, WIDTH),
        "H": (rows, WIDTH),
        "R_index": (rows, KEPT),
        "R_value": (rows, KEPT + 2),
        "tail": (2, 500),
    }
    for name, shape in shapes.items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert array.shape == shape
    d = group["D"]
    assert isinstance(d, zarr.Array)
    assert dict(d.attrs) == {"dtype": "bfloat16"}
    bits = torch.from_numpy(np.asarray(d[...]).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(bits, torch.cat([one.D for one in batch]))


@pytest.mark.parametrize("profile", PROFILES)
def test_the_manifest_lists_every_file_with_its_digest(tmp_path: Path, profile: str) -> None:
    path = write(tmp_path, batch_of(torch.bfloat16, 500, "both"), profile)
    manifest = read_manifest(path)
    found = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    text = found.pop(MANIFEST)
    assert manifest["files"] == {
        name: {"bytes": len(content), "xxh3_128": xxh3_128(content).hexdigest()}
        for name, content in found.items()
    }
    segment = manifest["segment"]
    assert segment["digest"] == sha256(text).hexdigest()
    assert segment["bytes"] == sum(map(len, found.values()))
    assert (segment["records"], segment["rows"]) == (len(LENGTHS), sum(LENGTHS))
    assert (segment["kind"], segment["profile"], segment["run_id"]) == ("gradients", profile, 1)
    assert manifest["run"] == ROOT_RUN


def test_records_lie_one_after_another(tmp_path: Path) -> None:
    table = read_manifest(write(tmp_path, batch_of(torch.bfloat16, 500, "input")))["tables"][
        "exposures"
    ]
    assert table["rows"] == LENGTHS
    assert table["row_start"] == [0, 3, 4, 204, 204, 211]
    assert table["token_start"] == [0, 4, 6, 207, 208, 216]


def test_tensors_and_tables_without_gradients(tmp_path: Path) -> None:
    """What put_state writes: moments in float32, or only a table."""
    moments = torch.rand(70, 33)
    arguments: dict[str, Any] = {"run": ROOT_RUN, "kind": "moments", "profile": "packed"}
    path = write_segment(tmp_path, arrays={"embedding": moments}, tables={}, **arguments)
    assert torch.equal(SegmentReader(path).tensor("embedding"), moments)
    assert torch.equal(SegmentReader(path).tensor("embedding", 3, 9), moments[3:9])
    empty = write_segment(tmp_path, arrays={}, tables={"holdout_losses": {"id": []}}, **arguments)
    assert read_manifest(empty)["segment"]["records"] == 0


def test_segments_are_numbered_and_found_in_order(tmp_path: Path) -> None:
    ranks = [tmp_path / "segments" / name for name in ("r0", "r1")]
    paths = [write(folder, records("a")) for folder in ranks for _ in range(3)]
    assert [path.name for path in paths] == ["000001", "000002", "000003"] * 2
    assert segment_paths(tmp_path) == paths


def test_only_what_is_unfinished_is_garbage(tmp_path: Path) -> None:
    path = write(tmp_path, records("a", "b"))
    unfinished = tmp_path / ".tmp-000002"
    (unfinished / "D").mkdir(parents=True)
    (unfinished / "D" / "zarr.json").write_text("{}")
    (tmp_path / "lock").touch()
    collect_garbage(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000001", "lock"]
    assert_all_equal(read_all(path), records("a", "b"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"segment": 3}', None])
def test_a_damaged_manifest(tmp_path: Path, content: bytes | None) -> None:
    path = write(tmp_path, records("a"))
    if content is None:
        (path / MANIFEST).unlink()
    else:
        (path / MANIFEST).write_bytes(content)
    with pytest.raises(StoreDamaged, match=r"manifest\.json is damaged"):
        read_manifest(path)


def test_a_place_beyond_the_end(tmp_path: Path) -> None:
    path = write(tmp_path, records("a"))
    place = {"row_start": 10_000, "rows": 1, "token_start": 0, "tail_row": None}
    with pytest.raises(StoreDamaged, match="rows 10000:10001"):
        SegmentReader(path).record(record("a").exposure, place)


def test_a_missing_array(tmp_path: Path) -> None:
    path = write(tmp_path, records("a"))
    (path / "D" / "zarr.json").unlink()
    with pytest.raises(StoreDamaged, match="D is not a readable array"):
        read_all(path)


def test_the_manifest_is_plain_json_whatever_the_ids_are(tmp_path: Path) -> None:
    ids = ["'; DROP TABLE samples; --", "../../x", "naïve 🦆", "x" * 300, "a\nb", '"', "\x00"]
    path = write(tmp_path, records(*ids))
    assert json.loads((path / MANIFEST).read_text("ascii"))["tables"]["exposures"]["id"] == ids
    assert_all_equal(read_all(path), records(*ids))
