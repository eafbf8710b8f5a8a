"""Exports open in other tools and hold what the store holds."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet
import pytest
import torch
from records import RUN, WIDTH, record
from safetensors import safe_open
from tiny import Tiny, digests, refused, run, run_json

from gradstore import Store
from gradstore.errors import IdError, StoreExists
from gradstore.store.export import export_gradients, export_tables
from gradstore.store.format import ModelIdentity
from gradstore.store.writer import SegmentWriter

pytest_plugins = ["tiny"]


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and metadata of an exported file, read by the format's own library."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file if name != "gradstore"}
            return arrays, json.loads(str(file["gradstore"]))
    with safe_open(path, "pt") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return arrays, json.loads(file.metadata()["gradstore"])


def test_tables_and_views_as_parquet(trained: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "made" / "tables"
    written = run_json("export", "--tables", out, "-s", trained.store)
    store = Store.open(trained.store)
    names = {table["name"] for table in store.schema()[0] if table["kind"] != "function"}
    assert {Path(row["file"]).stem for row in written} == names
    assert {path.name for path in out.iterdir()} == {f"{name}.parquet" for name in names}
    for row in written:
        name = Path(row["file"]).stem
        query = "SELECT * FROM {} ORDER BY ALL"
        with duckdb.connect() as other:
            cursor = other.execute(query.format(f"'{row['file']}'"))
            columns = [column[0] for column in cursor.description or ()]
            rows = cursor.fetchall()
        assert (columns, rows) == store.query(query.format(name))
        assert row["rows"] == len(rows)
    fields = pyarrow.parquet.read_schema(out / "exposures.parquet")
    assert fields.field("d_norm").metadata[b"comment"].startswith(b"Frobenius norm")


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_exported_tables_and_views_open_as_data_frames(
    trained: Tiny, tmp_path: Path, library: str
) -> None:
    frames = import_module(library)
    run_json("export", "--tables", tmp_path / "tables", "-s", trained.store)
    store = Store.open(trained.store)
    for table in store.schema()[0]:
        if table["kind"] == "function":
            continue
        frame = frames.read_parquet(tmp_path / "tables" / f"{table['name']}.parquet")
        columns, rows = store.query(f"SELECT * FROM {table['name']}")
        assert (list(frame.columns), len(frame)) == (columns, len(rows))
        if table["name"] == "gradients":
            assert sorted(frame["d_norm"]) == sorted(row[columns.index("d_norm")] for row in rows)


@pytest.mark.parametrize("format", ["safetensors", "npz"])
def test_gradients_as_they_are_stored(trained: Tiny, tmp_path: Path, format: str) -> None:
    out = tmp_path / f"some.{format}"
    written = run_json("export", "--gradients", "p-03", "p-01", out, "--dense", "-s", trained.store)
    store = Store.open(trained.store)
    stored = list(store.records(list(store.resolve(["p-03", "p-01"]).values()), 1))
    arrays, metadata = read(out)
    assert [(row["id"], row["epoch"]) for row in written] == [
        ("p-03", 1), ("p-03", 2), ("p-01", 1), ("p-01", 2)
    ]  # fmt: skip
    assert metadata["model"]["vocabulary"] == store.model.vocabulary
    for n, one in enumerate(stored):
        assert metadata["records"][n]["id"] == one.exposure.id
        assert metadata["records"][n]["loss"] == one.exposure.loss
        assert one.output is not None
        parts = {"tokens": one.tokens, "scored": one.scored, "D": one.D, "H": one.output.H,
                 "R_index": one.output.index, "R_value": one.output.value,
                 "R_label": one.output.label, "tail_mass": one.output.tail_mass,
                 "tail": one.output.tail}  # fmt: skip
        for name, part in parts.items():
            got = arrays.pop(f"{n}/{name}")
            assert torch.equal(got.float(), part.float()), name
            assert got.dtype == part.dtype or format == "npz"
        for layer in ("embedding", "position"):
            got = arrays.pop(f"{n}/dense/{layer}")
            assert torch.equal(got, one.gradient(store.model, layer).dense())
    assert not arrays


def test_only_one_epoch_and_only_factors(trained: Tiny, tmp_path: Path) -> None:
    store, out = Store.open(trained.store), tmp_path / "x"
    described = export_gradients(store, ["p-02"], out, epoch=2, format="npz")
    assert [(one["id"], one["epoch"], one["run"]) for one in described] == [("p-02", 2, "run-1")]
    with np.load(out) as file:
        assert not [name for name in file if "dense" in name]
        assert file["0/D"].dtype == np.float32


def test_an_untied_head_is_a_matrix_of_its_own(store: Store, tmp_path: Path) -> None:
    from records import tail

    model = ModelIdentity("LlamaForCausalLM", 500, WIDTH, WIDTH, None, False, "tokens-a")
    store.bind(model, "here")
    writer = SegmentWriter(store, store.begin_run(RUN))
    one = record("../a/é", tail=tail())
    writer.put([one])
    writer.close()
    export_gradients(store, ["../a/é"], tmp_path / "x.safetensors", dense=True)
    arrays, metadata = read(tmp_path / "x.safetensors")
    assert metadata["records"][0]["id"] == "../a/é"
    assert {name for name in arrays if "dense" in name} == {"0/dense/embedding", "0/dense/head"}
    torch.testing.assert_close(arrays["0/dense/head"], one.gradient(model, "head").dense())


def test_nothing_is_overwritten_without_force(trained: Tiny, tmp_path: Path) -> None:
    store, tables = ["-s", trained.store], tmp_path / "tables"
    tables.mkdir()
    (tables / "samples.parquet").write_text("mine")
    assert "exists; choose another place, or add --force" in refused(
        "export", "--tables", tables, *store
    )
    out = tmp_path / "x.npz"
    out.write_text("mine")
    before = digests(tmp_path)
    assert "exists" in refused("export", "--gradients", "p-01", out, *store)
    with pytest.raises(StoreExists):
        export_tables(Store.open(trained.store), tables)
    assert digests(tmp_path) == before
    run("export", "--tables", tables, "--force", *store)
    run("export", "--gradients", "p-01", out, "--force", *store)
    assert read(out)[1]["records"][0]["id"] == "p-01"
    assert pyarrow.parquet.read_table(tables / "samples.parquet").num_rows == 32
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{out}"], "either --tables or --gradients"),
        (["--tables", "--gradients", "p-01", "{out}.npz"], "either --tables or --gradients"),
        (["--tables", "p-01", "{out}"], "takes a folder and no ids"),
        (["--gradients", "{out}.npz"], "name the ids"),
        (["--gradients", "p-01", "{out}.csv"], "does not end in .safetensors or .npz"),
        (["--gradients", "p-01", "{out}", "--format", "csv"], "Invalid value for '--format'"),
        (["--gradients", "p-01", "{out}.npz", "--epoch", 0], "Invalid value for '--epoch'"),
    ],
)
def test_usage(arguments: list[object], said: str, trained: Tiny, tmp_path: Path) -> None:
    filled = [str(argument).format(out=tmp_path / "x") for argument in arguments]
    assert said in refused("export", *filled, "-s", trained.store, code=2)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there(trained: Tiny, tmp_path: Path) -> None:
    out, store = tmp_path / "x.npz", ["-s", trained.store]
    assert "no sample has the id 'q-01'" in refused("export", "--gradients", "q-01", out, *store)
    held = refused("export", "--gradients", "p-01", "h-01", out, *store)
    assert held == "run-1 stored no gradient of h-01; see `gradstore show h-01`"
    with pytest.raises(IdError, match="no gradient of epoch 9 of p-01"):
        export_gradients(Store.open(trained.store), ["p-01"], out, epoch=9)
    other = refused("export", "--gradients", "p-01", out, "--run", "other", *store)
    assert "no run 'other'" in other
    assert list(tmp_path.iterdir()) == []
