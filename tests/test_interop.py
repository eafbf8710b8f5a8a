"""Other libraries read the arrays of every profile, and find the same gradients."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from records import RUN, VOCABULARY, WIDTH, record, tail
from test_docs import ROOT, blocks
from test_segment import batch_of, write

from gradstore import Store
from gradstore.store.format import PROFILES, ModelIdentity
from gradstore.store.segment import SegmentReader
from gradstore.store.writer import SegmentWriter


@pytest.fixture(params=PROFILES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A segment with all kinds of arrays."""
    return write(tmp_path, batch_of(torch.bfloat16, 70_000, "both"), request.param)


def stored(path: Path) -> dict[str, Any]:
    """What our reader finds, as the numbers that Zarr has."""
    reader, found = SegmentReader(path), {}
    for name in (p.name for p in path.iterdir() if p.is_dir()):
        tensor = reader.stored(name)
        bits = tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor
        found[name] = bits.numpy().view(np.uint16) if bits is not tensor else bits.numpy()
    return found


def by_zarr(path: Path) -> dict[str, Any]:
    group = zarr.open_group(path, mode="r")
    return {name: np.asarray(group[name]) for name in stored(path)}


def assert_same(read: dict[str, Any], path: Path) -> None:
    for name, ours in stored(path).items():
        assert read[name].shape == ours.shape, name
        assert np.array_equal(read[name], ours), name


def test_zarr_python(path: Path) -> None:
    assert_same(by_zarr(path), path)


def test_zarrs(path: Path) -> None:
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        assert_same(by_zarr(path), path)


def test_tensorstore(path: Path) -> None:
    def read(name: str) -> Any:
        where = {"driver": "file", "path": str(path / name)}
        return tensorstore.open({"driver": "zarr3", "kvstore": where}).result().read().result()

    assert_same({name: read(name) for name in stored(path)}, path)


@pytest.mark.parametrize("head", ["tied", "untied", "not captured"])
@pytest.mark.parametrize("profile", PROFILES)
def test_the_reader_of_the_documentation(tmp_path: Path, profile: str, head: str) -> None:
    store = Store.create(tmp_path / "store", profile=profile)
    store.bind(ModelIdentity("any", VOCABULARY, WIDTH, WIDTH, None, head != "untied"), "the test")
    ids = ("a", "b", "c")
    tails = (None, None) if head == "not captured" else (tail("one"), tail("two"))
    with closing(SegmentWriter(store, store.begin_run(RUN))) as writer:
        writer.put([record(id, epoch=n + 1, tail=tails[n]) for id in ids for n in range(2)])
    names: dict[str, Any] = {}
    for _, code in blocks(ROOT / "docs" / "store-format.md", "python"):
        if "def factor(" in code or "def gradient(" in code:
            exec(code, names)
    for one in store.records(list(store.resolve(ids).values()), 1):
        read = names["gradient"](store.root, one.exposure.id, 1, one.exposure.epoch)
        ours = one.gradient(store.model).dense().numpy()
        off = np.linalg.norm(read - ours) / np.linalg.norm(ours)
        assert off < (2**-8 if profile == "small" else 1e-6)  # which is rounded to bfloat16 here
