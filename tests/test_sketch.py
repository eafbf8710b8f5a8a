"""Sketches: what a random projection keeps of gradients, and how a search by them ends."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from records import WIDTH
from test_scan import MODEL, SHAPE, met, query, segment
from tiny import FRESH, Tiny, digests, files, refused, run, run_json
from torch import Tensor

from gradstore import Store
from gradstore.errors import InfluenceError, SettingsError
from gradstore.influence.axes import AXES, reduced
from gradstore.influence.executors import executor_of, parse_executor
from gradstore.influence.nominate import nominated, open_search
from gradstore.influence.query import Checkpoint, of_sample
from gradstore.influence.sketch import Projection
from gradstore.influence.sketches import Sketches, open_sketches, sketch
from gradstore.influence.top import Settings, influences

pytest_plugins = ["tiny"]


# -- a projection ------------------------------------------------------------------------------


def dumb(projection: Projection, gradient: Tensor) -> Tensor:
    """Entry (i, j) into bucket h(i) + j with its sign, one at a time."""
    bucket, sign, flip = projection._drawn
    found = torch.zeros(projection.size)
    for i, j in gradient.nonzero().tolist():
        found[(int(bucket[i]) + j) % projection.size] += sign[i] * flip[j] * gradient[i, j]
    return found


@pytest.mark.parametrize("size", [64, 33, 16, 5])
def test_entries_are_hashed_as_said(size: int) -> None:
    projection, gradient = Projection(size, 3, SHAPE), query(7)
    assert torch.allclose(projection.of(gradient), dumb(projection, gradient.dense()), atol=1e-3)
    assert WIDTH == 16  # so that buckets are more and fewer than columns here


@pytest.mark.parametrize("profile", ["raw", "packed"])
@pytest.mark.parametrize("sides", [None, "input"])
def test_a_segments_sketches_are_those_of_its_gradients(
    tmp_path: Path, profile: str, sides: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = met()
    path, places = segment(tmp_path, records, profile)
    projection = Projection(64, 0, SHAPE)
    monkeypatch.setattr("gradstore.influence.sketch._ROWS", 40)  # records and tails are cut
    found = projection.of_segment(path, places[::-1], sides)
    wanted = [projection.of(r.gradient(MODEL, sides=sides)) for r in reversed(records)]
    assert torch.allclose(found, torch.stack(wanted), rtol=1e-3, atol=1e-3)


@given(st.integers(2, 9), st.integers(2, 9), st.floats(-4, 4), st.integers(2, 100))
def test_sketches_are_linear(rank: int, other: int, factor: float, size: int) -> None:
    projection, a, b = Projection(size, 1, SHAPE), query(rank, 1), query(other, 2)
    both = projection.of(a) + factor * projection.of(b)
    assert torch.allclose(projection.of(a + b * factor), both, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("size", [8, 64, 256])
def test_products_of_sketches_are_unbiased_and_narrow_with_the_size(size: int) -> None:
    a, b = query(8, 1), query(8, 1) * 0.5 + query(8, 2)
    seeds = [Projection(size, seed, SHAPE) for seed in range(300)]
    found = torch.stack([one.of(a) @ one.of(b) for one in seeds]).double()
    error = float(found.std()) / len(seeds) ** 0.5
    assert abs(float(found.mean()) - a.dot(b)) < 4 * error
    assert float(found.std()) < 2 * a.norm() * b.norm() / size**0.5
    # a sketch of the other sign or of nothing would be further away than that
    assert abs(a.dot(b)) > 8 * error or size == 8


# -- a store -----------------------------------------------------------------------------------


@pytest.fixture
def sketched(copied: Tiny) -> Tiny:
    with Store.open(copied.store) as store:
        assert sketch(store, size=64) == (2, 2)
        assert sketch(store) == (0, 2)
    return copied


@pytest.mark.parametrize("epochs", ["all", "first", "2"])
@pytest.mark.parametrize("method", ["dot", "cosine"])
def test_as_many_nominated_as_there_are_give_the_exact_answer(
    sketched: Tiny, method: str, epochs: str
) -> None:
    store = Store.open(sketched.store)
    asked = [
        of_sample(store, store.run(), "p-03"),
        Checkpoint(store, sketched.model).of_completion("Ada is a baker, born", " in 1966"),
    ]
    settings = Settings(method, epochs=epochs)  # type: ignore[arg-type]
    exact = influences(store, asked, settings)
    both = influences(store, asked, replace(settings, coarse=24))
    for found, truth in zip(both, exact, strict=True):
        assert found.sample_ids == truth.sample_ids
        assert found.values == pytest.approx(truth.values, rel=1e-5)
    for few, truth in zip(
        influences(store, asked, replace(settings, coarse=6)), exact, strict=True
    ):
        scores = dict(zip(truth.sample_ids, truth.values, strict=True))
        assert len(few.values) == 6
        assert few.values == pytest.approx([scores[n] for n in few.sample_ids], rel=1e-5)


def along_few(count: int, size: int, rank: int) -> Sketches:
    """Sketches in two segments, which all lie in a few directions."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(count, rank, generator=draw) @ torch.randn(rank, size, generator=draw)
    units = (rows / rows.norm(dim=1, keepdim=True)).half()
    third = count // 3
    return Sketches(Projection(size, 0, SHAPE), [units[:third], units[third:]], torch.ones(count))


def test_sketches_in_few_directions_are_reduced_without_loss() -> None:
    sketches = along_few(600, 2 * AXES, 8)
    before = torch.get_rng_state()
    one, other = reduced(sketches), reduced(sketches)
    assert one is not None
    assert other is not None
    assert torch.equal(one.rows, other.rows)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.rows.shape == (600, AXES)
    assert one.rows.dtype is torch.float16
    assert torch.allclose(one.axes.T @ one.axes, torch.eye(AXES), atol=1e-4)
    asked = sketches.some(np.array([3, 250, 599])).T
    assert torch.allclose(one.products(asked), sketches.products(asked), atol=4e-3)
    assert reduced(along_few(600, 2 * AXES - 1, 8)) is None
    assert reduced(along_few(AXES - 1, 2 * AXES, 8)) is None


@pytest.mark.parametrize("often", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
def test_large_sketches_nominate_who_scores_highest(
    copied: Tiny, cosine: bool, often: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstore.influence.axes.AXES", 16)
    monkeypatch.setattr("gradstore.influence.nominate._LEADING", 2)
    store = Store.open(copied.store)
    sketch(store, size=1 << 14)
    asked = [of_sample(store, store.run(), id) for id in ("p-03", "p-20")]
    exact = influences(store, asked, Settings("cosine" if cosine else "dot"))
    search = open_search(store, store.run(), often=often)
    assert (search.reduced is not None) == often
    chosen = nominated(search, asked, 8, cosine=cosine)
    for ids, truth in zip(chosen, exact, strict=True):
        assert len(ids) == 8
        assert set(truth.sample_ids[:4]) <= set(ids)


def test_sketches_follow_their_segments(sketched: Tiny) -> None:
    store = Store.open(sketched.store)
    asked, two = of_sample(store, store.run(), "p-03"), Settings(coarse=5)
    before = open_sketches(store, store.run())
    assert (before.projection.size, before.lengths.shape) == (64, (48,))
    first, second = sorted((sketched.store / "sketches" / "r0").iterdir())

    shutil.rmtree(second)  # as if its segment came later
    with pytest.raises(InfluenceError, match=r"1 of the 2 segments.*gradstore sketch -s .* run-1"):
        influences(store, [asked], two)
    assert sketch(store) == (1, 2)

    facts = json.loads((first / "zarr.json").read_text())
    for name, other in (("segment", "rewritten"), ("scheme", "of another release"), ("seed", 7)):
        damaged = facts | {"attributes": facts["attributes"] | {name: other}}
        (first / "zarr.json").write_text(json.dumps(damaged))
        with pytest.raises(InfluenceError, match="1 of the 2 segments"):
            influences(store, [asked], two)
    (first / "zarr.json").write_text("{")
    with pytest.raises(InfluenceError, match="1 of the 2 segments"):
        influences(store, [asked], two)
    (first.parent / "000099").mkdir()  # of an erased segment
    (first.parent / ".tmp-000003").mkdir()  # of a killed process
    assert sketch(store) == (1, 2)
    assert sorted(first.parent.iterdir()) == [first, second]

    after = open_sketches(store, store.run())
    assert torch.equal(after.lengths, before.lengths)
    assert all(map(torch.equal, after.blocks, before.blocks))
    assert sketch(store, size=32) == (2, 2)
    assert open_sketches(store, store.run()).projection.size == 32
    assert sketch(store, size=32, seed=1) == (2, 2)


def test_ingest_sketches_as_the_command_does(tmp_path: Path) -> None:
    tiny = files(tmp_path)
    run("init", tiny.store)
    run("ingest", tiny.data, "-s", tiny.store, "--config", tiny.config, *FRESH, "--epochs", 1,
        "--sketch", 64, "--out", tiny.model)  # fmt: skip
    made = digests(tiny.store / "sketches")
    assert made
    shutil.rmtree(tiny.store / "sketches")
    run("sketch", "-s", tiny.store, "--dim", 64)
    assert digests(tiny.store / "sketches") == made


def test_sketches_are_unit_vectors_beside_their_lengths(sketched: Tiny) -> None:
    store = Store.open(sketched.store)
    found = open_sketches(store, store.run())
    places = store.table(
        """SELECT * FROM exposures JOIN samples USING (sample_id) ORDER BY segment_id, row_start"""
    )
    wanted = torch.stack(
        [found.projection.of(store.record_at(place).gradient(store.model)) for place in places]
    )
    units = found.products(torch.eye(64))
    assert torch.allclose(
        units * found.lengths[:, None], wanted, atol=2e-3 * wanted.abs().max().item()
    )
    assert units.norm(dim=1) == pytest.approx(1, abs=1e-3)
    some = [0, 7, 23, 24, 47]
    assert torch.allclose(found.some(np.array(some)), units[some], atol=1e-3)
    assert torch.allclose(found.products(units[7:9].T), units @ units[7:9].T, atol=2e-3)


@pytest.mark.parametrize(
    "settings",
    [Settings(adam=True), Settings("self"), Settings(sides="input")],
    ids=["adam", "self", "input"],
)
def test_what_sketches_cannot_estimate_is_refused(sketched: Tiny, settings: Settings) -> None:
    store = Store.open(sketched.store)
    asked = [] if settings.method == "self" else [of_sample(store, store.run(), "p-03")]
    with pytest.raises(SettingsError, match="leave --coarse out"):
        influences(store, asked, replace(settings, coarse=5))


# -- the commands ------------------------------------------------------------------------------


def test_top_in_two_stages_says_so(copied: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("top", "--id", "p-03", "-s", copied.store, "-k", 3, "--dry-run")
    error = refused(*asked, "--coarse", 20)
    assert f"gradstore sketch -s {copied.store} --run run-1" in error
    made = run("sketch", "-s", copied.store, "--dim", 4096)
    assert "2 of the 2 segments of run-1 were sketched" in made.stderr
    assert made.stdout == ""
    exact, few = run(*asked, "--csv"), run(*asked, "--coarse", 20, "--csv")
    assert few.stdout == exact.stdout
    assert "two stages: of all records 20 were scored exactly" in few.stderr
    assert "two stages" not in exact.stderr

    monkeypatch.setattr("gradstore.influence.sketches.MANY", 10)
    assert "two stages: of all records 24 were" in run(*asked).stderr
    for scanned in (("--coarse", 0), ("--adam",), ("--side", "input"), ("--bottom",)):
        assert "two stages" not in run(*asked, *scanned).stderr
    shutil.rmtree(copied.store / "sketches")
    assert "all records are read: 2 of the 2 segments" in run(*asked).stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--coarse", "20", "--adam"], "leave --adam, --bottom and --side input out"),
        (["--coarse", "20", "--bottom"], "leave --adam, --bottom and --side input out"),
        (["--coarse", "10"], "leaves nothing to choose 10 rows (-k) from"),
        (["--executor", "ray"], "'ray' names no executor; expected here, dask"),
    ],
)
def test_top_explains_its_stages_and_executors(
    trained: Tiny, arguments: list[str], said: str
) -> None:
    assert said in refused("top", "--id", "p-03", "-s", trained.store, *arguments, code=2)


def test_half_gradients_under_a_whole_query_are_told(tmp_path: Path, trained: Tiny) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    run("init", store)
    run(
        "ingest", trained.data, "-s", store, "--model", trained.model, "--sides", "input",
        "--epochs", 1, "--out", out,
    )  # fmt: skip
    asked = ("top", "--text", "Ada is a baker", "-s", store, "-k", 1, "--dry-run")
    assert "half of a tied embedding's gradient" in run(*asked).stderr
    assert "half" not in run(*asked, "--side", "input").stderr
    assert "half" not in run("top", "--id", "p-03", *asked[3:]).stderr


# -- executors ---------------------------------------------------------------------------------


def test_dask_gives_the_same_scores(trained: Tiny) -> None:
    store = Store.open(trained.store)
    asked = [of_sample(store, store.run(), "p-03")]
    with executor_of("here") as here, executor_of("dask") as dask:
        for method in ("dot", "cosine"):
            settings = Settings(method)
            [one] = influences(store, asked, settings, executor=here)
            [other] = influences(store, asked, settings, executor=dask)
            assert one.sample_ids == other.sample_ids
            # a float32 product's last bit depends on where in memory its factors come to lie
            rounding = 1e-6 * max(map(abs, one.values))
            assert one.values == pytest.approx(other.values, rel=1e-5, abs=rounding)


def test_a_worker_process_of_a_scheduler_gives_the_same_scores(trained: Tiny) -> None:
    distributed = pytest.importorskip("distributed", reason="needs `pip install gradstore[dask]`")
    one: Any = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    asked = ("top", "--id", "p-03", "-s", trained.store, "--dry-run", "-k", 24, "--executor")
    with distributed.LocalCluster(processes=True, **one) as cluster:
        [worker] = cluster.workers.values()
        assert worker.pid != os.getpid()
        found = run_json(*asked, f"dask:{cluster.scheduler_address}")
    assert found == run_json(*asked, "here")


def test_dask_that_is_missing_or_silent_is_told(
    trained: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("top", "--id", "p-03", "-s", trained.store, "--dry-run", "--executor")
    monkeypatch.setattr("gradstore.influence.executors.SECONDS", 1)
    assert "no Dask scheduler answers at" in refused(*asked, "dask:tcp://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert "pip install 'gradstore[dask]'" in refused(*asked, "dask")


def test_an_executor_is_here_or_dask() -> None:
    assert parse_executor("here") is parse_executor("dask") is None
    assert parse_executor("dask:tcp://host:8786") == "tcp://host:8786"
    for text in ("dask:", "threads", ""):
        with pytest.raises(ValueError, match="names no executor"):
            parse_executor(text)
