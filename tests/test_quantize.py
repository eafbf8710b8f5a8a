"""Profile small: every row within its bound, whatever it holds, and readable by a rule in NumPy."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from records import RUN, record, records, tail
from test_segment import batch_of, read_all, write
from tiny import run
from torch import Tensor

from gradstore import Store
from gradstore.errors import StoreDamaged
from gradstore.store.arrays import write_array
from gradstore.store.quantize import ERROR, decode, encode, lacking
from gradstore.store.record import Record
from gradstore.store.segment import SegmentReader, write_segment
from gradstore.store.writer import SegmentWriter
from gradstore.upkeep.rewrite import rewrite
from gradstore.upkeep.search import search, traces

ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "an outlier channel": lambda x: x.index_fill(0, torch.tensor([0]), 300.0),
    "some outlier channels": lambda x: torch.where(torch.arange(len(x)) % 50 == 0, 40 * x, x),
    "one entry": lambda x: torch.zeros_like(x).index_fill(0, torch.tensor([len(x) - 1]), 1.0),
    "equal entries": lambda x: torch.ones_like(x),
    "halves of a step": lambda x: x.sign() * 10.5 / 24,
    "heavy tails": lambda x: x**5,
    "zeros": lambda x: 0 * x,
}


def rows(kinds: list[str], width: int, power: int, seed: int) -> Tensor:
    """A row of each kind, times a power of two."""
    draw = torch.Generator().manual_seed(seed)
    made = [ROWS[kind](torch.randn(width, generator=draw)) for kind in kinds]
    return torch.stack(made) * 2.0**power


matrices = st.builds(
    rows,
    st.lists(st.sampled_from(sorted(ROWS)), min_size=1, max_size=12),
    st.sampled_from([1, 2, 64, 768]),
    st.integers(-100, 100),
    st.integers(0, 9),
)


def cosines(got: Tensor, want: Tensor) -> Tensor:
    """Of each row, in float64; 1 for rows that are zero in both."""
    got, want = got.double(), want.double()
    norms = got.norm(dim=1) * want.norm(dim=1)
    return torch.where(got.eq(want).all(1), 1.0, (got * want).sum(1) / norms)


@given(matrices)
def test_the_worst_row_is_near_enough(matrix: Tensor) -> None:
    matrix = matrix.bfloat16()
    codes, steps, wide = encode(matrix)
    got = decode(codes, steps, wide)
    assert (codes.dtype, steps.dtype, got.dtype) == (torch.int8, torch.float32, torch.bfloat16)
    assert cosines(got, matrix).min() >= 0.9999
    error = (got.double() - matrix.double()).norm(dim=1)
    assert (error <= ERROR * matrix.double().norm(dim=1)).all()
    whole = lacking(steps)
    assert torch.equal(got[whole], matrix[whole])
    assert not codes[whole].any()
    assert not wide[~whole].any()


@pytest.mark.parametrize("profile", ["packed", "raw"])
def test_the_other_profiles_lose_what_bfloat16_does(tmp_path: Path, profile: str) -> None:
    matrix = rows(sorted(ROWS) * 20, 768, -7, 0)
    path = put(tmp_path, matrix.bfloat16(), profile)
    assert cosines(SegmentReader(path).tensor("D"), matrix).min() >= 0.99999


def put(folder: Path, matrix: Tensor, profile: str = "small") -> Path:
    return write_segment(
        folder, run={**RUN, "run_id": 1}, kind="gradients", profile=profile, arrays={"D": matrix},
        tables={},
    )  # fmt: skip


def test_gaussian_rows_all_fit_and_outliers_do_not() -> None:
    steps = encode(rows(["normal"] * 200 + ["an outlier channel"] * 3, 768, 0, 1).bfloat16())[1]
    assert lacking(steps).nonzero().flatten().tolist() == [200, 201, 202]


def test_what_is_no_number_is_kept_as_it_is() -> None:
    matrix = rows(["normal"] * 3, 64, 0, 0).bfloat16()
    matrix[0, 3], matrix[1, 5] = torch.inf, torch.nan
    got = decode(*encode(matrix))
    assert torch.equal(got[:2].view(torch.int16), matrix[:2].view(torch.int16))


def test_a_segment_gives_factors_back_within_the_bound_and_all_else_to_the_bit(
    tmp_path: Path,
) -> None:
    batch = batch_of(torch.bfloat16, 500, "both")
    path = write(tmp_path, batch, "small")
    assert SegmentReader(path).stored("D").dtype is torch.int8
    exact = read_all(write(tmp_path, batch, "packed"))
    for got, want in zip(read_all(path), exact, strict=True):
        assert got.output is not None
        assert want.output is not None
        for found, wanted in ((got.D, want.D), (got.output.H, want.output.H)):
            assert found.dtype is torch.bfloat16
            assert (cosines(found, wanted) >= 0.9999).all()
        for part in ("value", "label", "tail_mass", "tail", "index"):
            assert torch.equal(getattr(got.output, part), getattr(want.output, part))
        assert torch.equal(got.tokens, want.tokens)
        assert torch.equal(got.scored, want.scored)


def test_any_range_of_rows(tmp_path: Path) -> None:
    matrix = rows(["normal"] * 150 + ["one entry"] * 2 + ["normal"] * 150, 64, 0, 0).bfloat16()
    reader = SegmentReader(put(tmp_path, matrix))
    whole = reader.tensor("D")
    for start, stop in ((0, 0), (3, 100), (140, 151), (151, 152), (149, 302)):
        assert torch.equal(reader.tensor("D", start, stop), whole[start:stop])


def test_the_rule_of_the_documentation(tmp_path: Path) -> None:
    matrix = rows(["normal"] * 20 + ["one entry", "heavy tails", "zeros"], 64, -3, 0).bfloat16()
    path = put(tmp_path, matrix)
    segment = zarr.open_group(path, mode="r")
    codes, step, wide = (np.asarray(segment[name]) for name in ("D", "D.step", "D.wide"))
    as_float = (wide.astype(np.uint32) << 16).view(np.float32)
    D = np.where(step[:, None] > 0, codes * step[:, None], as_float)
    got = SegmentReader(path).tensor("D")
    assert torch.equal(torch.from_numpy(D).bfloat16(), got)


def test_a_matrix_of_which_most_rows_do_not_fit_is_not_encoded(tmp_path: Path) -> None:
    matrix = rows(["an outlier channel"] * 3 + ["normal"] * 2, 768, 0, 0).bfloat16()
    path = put(tmp_path, matrix)
    assert sorted(p.name for p in path.iterdir() if p.is_dir()) == ["D"]
    assert torch.equal(SegmentReader(path).tensor("D"), matrix)


def test_it_is_smaller(tmp_path: Path) -> None:
    matrix = rows(["normal"] * 500, 768, 0, 0).bfloat16()
    sizes = []
    for profile in ("small", "packed"):
        files = put(tmp_path, matrix, profile).rglob("*")
        sizes.append(sum(file.stat().st_size for file in files if file.is_file()))
    assert sizes[0] < 0.45 * matrix.nbytes < 0.6 * sizes[1]


def test_rewriting_carries_codes_over(tmp_path: Path) -> None:
    batch = records("a", "b", "c", tail=tail())
    Store.create(tmp_path, profile="small")
    old = write(tmp_path / "segments" / "r0", batch, "small")
    kept: list[Record] = read_all(old)[::2]
    new = rewrite(tmp_path, [old], lambda row: row["id"] != "b", "small")
    assert SegmentReader(new).stored("D").dtype is torch.int8
    for got, want in zip(read_all(new), kept, strict=True):
        assert torch.equal(got.D, want.D)


def test_rewriting_rounds_nothing_that_was_kept(tmp_path: Path) -> None:
    wide = rows(["an outlier channel"] * 3, 768, 0, 0).bfloat16()
    fits = rows(["normal"] * 2, 768, 0, 1).bfloat16()
    assert not torch.equal(decode(*encode(fits)), fits), "else this shows nothing"
    batch = [replace(record("wide", rows=3), D=wide), replace(record("fits", rows=2), D=fits)]
    Store.create(tmp_path, profile="small")
    old = write(tmp_path / "segments" / "r0", batch, "small")
    new = rewrite(tmp_path, [old], lambda row: row["id"] != "wide", "small")
    assert torch.equal(SegmentReader(new).tensor("D"), fits)


def test_parts_that_do_not_fit_each_other(tmp_path: Path) -> None:
    path = put(tmp_path, record("a", rows=9).D)
    (path / "D.step").rename(path / "gone")
    with pytest.raises(StoreDamaged, match=r"D\.step"):
        SegmentReader(path).tensor("D")
    write_array(path / "D.step", np.ones((9, 2), "float32"), "raw")
    with pytest.raises(StoreDamaged, match="the parts of D do not fit"):
        SegmentReader(path).tensor("D")


def test_float32_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eight bits"):
        Store.create(tmp_path / "store", profile="small", dtype="float32")
    refused = run("init", tmp_path / "store", "--profile", "small", "--dtype", "float32", code=2)
    assert "leave out --dtype float32" in refused.stderr
    run("init", tmp_path / "store", "--profile", "small")
    assert Store.open(tmp_path / "store").format.profile == "small"


def test_the_search_of_an_erased_record_knows_its_codes(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", profile="small")
    with closing(SegmentWriter(store, store.begin_run(RUN))) as writer:
        writer.put(records("a", "b", tail=tail()))
    marks = traces(store, store.resolve(["a"]))
    hits = search(store, [], marks).hits
    assert {"D: segments/r0/000001/D, decoded", "H: segments/r0/000001/H, decoded"} <= set(hits)
