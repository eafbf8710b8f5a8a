"""KLOM, LiRA and U-LiRA: closed forms, SciPy, and the dumb loop."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import samples
from models import tiny as tiny_model
from numpy.typing import NDArray
from scipy import stats
from tiny import HELD_OUT, TRAINED, Tiny, refused, run_json

from gradstore import Store
from gradstore.evaluate.population import (
    compared,
    halves,
    klom,
    log_likelihood,
    margins,
    membership,
    u_lira,
)
from gradstore.training.model import load_model, load_tokenizer

pytest_plugins = ["tiny"]

Array = NDArray[np.float64]
VALUES = st.lists(st.floats(-150, 150), min_size=1, max_size=12)


def column(values: list[float]) -> Array:
    return np.array(values)[:, None]


def drawn(mean: float, count: int, records: int = 1, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(mean, 1, (count, records))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
def test_a_margin_is_the_log_odds_of_each_token(kind: str) -> None:
    model, tokens = tiny_model(kind).train(), list(samples(5).values())
    found = margins(model, tokens)
    for sample, margin in zip(tokens, found, strict=True):
        with torch.no_grad():
            p = model(input_ids=sample[None]).logits[0].double().softmax(-1)
        odds = [
            math.log(p[at, token] / (1 - p[at, token]))
            for at, token in enumerate(sample[1:].tolist())
        ]
        assert margin == pytest.approx(sum(odds) / len(odds), rel=1e-5, abs=1e-5)
    assert model.training


def test_certain_predictions_are_clipped() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1e5)
    assert np.abs(margins(model, list(samples(4).values()))).max() <= 100


@settings(max_examples=60)
@given(VALUES, VALUES)
def test_klom_is_scipy_s_entropy_of_histograms(a: list[float], b: list[float]) -> None:
    p, q = np.clip(a, -100, 100), np.clip(b, -100, 100)
    low, high = min(p.min(), q.min()), max(p.max(), q.max())
    edges = np.linspace(low, high if high > low else low + 1, 21)
    ours, theirs = (np.histogram(x, edges)[0] / len(x) for x in (p, q))
    theirs = np.where((ours > 0) & (theirs < 1e-5), 1e-5, theirs)
    [found] = klom(column(a), column(b))
    assert found == pytest.approx(stats.entropy(ours, theirs), abs=1e-9)
    assert found >= -1e-12


def test_klom_in_closed_form() -> None:
    alike = drawn(0, 9, 3)
    assert klom(alike, alike) == pytest.approx([0] * 3)
    apart = math.log((1 + 1e-5) / 1e-5)
    assert klom(column([1.0, 1.0]), column([0.0, 0.0])) == pytest.approx([apart])  # the greatest
    assert klom(column([0.0, 0.0]), column([1.0, 1.0])) == pytest.approx([apart])
    assert klom(column([3.0]), column([3.0])) == [0]
    many = klom(drawn(0.5, 200_000), drawn(0, 200_000, seed=1))
    assert many == pytest.approx([0.5**2 / 2], rel=0.06)  # of two Gaussians
    assert halves(drawn(0, 4)) == pytest.approx(klom(drawn(0, 4)[[0, 2]], drawn(0, 4)[[1, 3]]))


def test_likelihoods_are_scipy_s() -> None:
    models, x = drawn(2, 7, 4), np.array([0.0, 1.0, 2.0, 90.0])
    expected = [stats.norm(*stats.norm.fit(m)).logpdf(v) for m, v in zip(models.T, x, strict=True)]
    assert log_likelihood(x, models) == pytest.approx(expected)


def test_membership_in_closed_form() -> None:
    inside, outside = column([1.0, 3.0]), column([-1.0, -3.0])  # deviation 1 around 2 and -2
    for x in (-100.0, -1.0, 0.0, 0.25, 5.0):
        [chance] = membership(np.array([x]), inside, outside)
        assert chance == pytest.approx(1 / (1 + math.exp(-4 * x)), abs=1e-12)
    same = column([1.0, 1.0])
    assert membership(np.ones(1), same, same) == [0.5]


def test_u_lira_leaves_each_pair_out() -> None:
    ours, references = drawn(1, 5, 6), drawn(0, 4, 6, seed=1)
    for at, found in enumerate(u_lira(ours, references)):
        p, q = ours[:, at], references[:, at]

        def density(x: float, of: Array) -> float:
            return float(stats.norm(*stats.norm.fit(of)).pdf(x))

        right = []
        for i, one in enumerate(p):
            for j, other in enumerate(q):
                inside, outside = np.delete(p, i), np.delete(q, j)
                right.append(density(one, inside) > density(one, outside))
                right.append(density(other, inside) < density(other, outside))
        assert found == pytest.approx(np.mean(right))


def test_u_lira_of_what_is_alike_and_what_is_not() -> None:
    for count in (3, 9):  # however few
        alike = u_lira(drawn(0, count, 900), drawn(0, count, 900, seed=1)).mean()
        assert alike == pytest.approx(0.5, abs=0.02)
    assert u_lira(drawn(0, 20, 9), drawn(50, 20, 9, seed=1)) == pytest.approx([1] * 9)


def test_what_cannot_be_told_is_said() -> None:
    one = {"model": drawn(0, 1, 3), "reference": drawn(0, 3, 3)}
    found, said = compared(one, [0])
    assert found == {"model": {}, "reference": {}}
    assert [text.split()[0] for text in said] == ["klom", "lira", "u_lira"]
    assert "given are 1 and 3" in said[0]
    found, said = compared({"original": drawn(1, 2, 3), "model": drawn(0, 1, 3)}, [0])
    assert "--reference" in said[0]
    assert found["model"] == {}


# -- the command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeds(trained: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints that differ a little, as by their seeds."""
    folder = tmp_path_factory.mktemp("seeds")
    tokenizer, paths = load_tokenizer(trained.model), []
    for seed in range(8):
        model = load_model(trained.model)
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.003)
        path = folder / str(seed)
        model.save_pretrained(path), tokenizer.save_pretrained(path)
        paths.append(path)
    return paths


def repeated(option: str, paths: list[Path]) -> list[object]:
    return [each for path in paths for each in (option, path)]


def test_many_against_many(copied: Tiny, seeds: list[Path]) -> None:
    chosen = [*repeated("--model", seeds[:3]), *repeated("--reference", seeds[3:7])]
    originals = repeated("--original", [copied.model, seeds[7]])
    found = run_json("eval", "p-03", "-s", copied.store, *chosen, *originals, code=3)
    rows = {(row["metric"], row["role"]): row for row in found["metrics"]}
    sizes = {"forget": 1, "retained": TRAINED - 1, "holdout": HELD_OUT}
    assert {role: rows["klom", role]["samples"] for role in sizes} == sizes
    with Store.open(copied.store) as store:
        tokens = store.tokens([store.resolve(["p-03"])["p-03"]], 1)
        kept = dict(store.rows("SELECT metric, model FROM evidence WHERE id = 'p-03'"))
        [(settings,)] = store.rows("SELECT settings FROM evaluations")
    of = [margins(load_model(path), list(tokens.values())) for path in seeds[:7]]
    ours, references = np.array(of[:3]), np.array(of[3:])
    row = rows["klom", "forget"]
    assert row["model"] == pytest.approx(klom(ours, references)[0]) == kept["klom"]
    assert row["reference"] == pytest.approx(halves(references)[0])
    assert rows["u_lira", "forget"]["model"] == pytest.approx(u_lira(ours, references)[0])
    assert ("u_lira", "retained") not in rows
    assert 0 <= rows["lira", "forget"]["model"] <= 1
    assert any("far from 0" in row["said"] for row in found["said"])
    assert '"more"' in settings


def test_what_is_needed_and_what_is_refused(
    copied: Tiny, seeds: list[Path], tmp_path: Path
) -> None:
    base = ["eval", "p-03", "-s", copied.store, "--dry-run", "--model", copied.model]
    found = run_json(*base, *repeated("--reference", seeds[:2]))
    assert not {"klom", "lira", "u_lira"} & {row["metric"] for row in found["metrics"]}
    assert any("klom needs at least 2" in row["said"] for row in found["said"])
    again = shutil.copytree(seeds[0], tmp_path / "again")
    said = refused(*base, *repeated("--reference", [seeds[0], again]))
    assert "two of the references have the same weights" in said
    twice = repeated("--reference", seeds[:2])
    assert "at most" in refused("eval", "--benchmark", "tofu", ".", copied.model, *twice, code=2)
