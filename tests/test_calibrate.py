"""Calibration measures what a training without the records says, and later requests follow it."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_exact import SETTINGS, exact
from tiny import FRESH, Tiny, counts, files, refused, run, run_json

from gradstore import Store
from gradstore.errors import ForgetError
from gradstore.evaluate.divergence import divergences, per_token
from gradstore.evaluate.loss import sample_losses
from gradstore.training.corpus import read_corpus, tokenize
from gradstore.training.ingest import train
from gradstore.training.model import load_model, load_tokenizer, new_model
from gradstore.unlearn.calibrate import calibrate
from gradstore.unlearn.forget import ForgetSettings, forget
from gradstore.unlearn.target import from_undoing

pytest_plugins = ["tiny"]
ALL = ["--epochs-captured", "all"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A run of which every epoch was captured."""
    tiny = files(tmp_path_factory.mktemp("whole"))
    run("init", tiny.store)
    run("ingest", tiny.data, "-s", tiny.store, "--config", tiny.config, *FRESH, *ALL,
        "--holdout", tiny.holdout, "--out", tiny.model)  # fmt: skip
    return tiny


def command(tiny: Tiny, *more: object) -> list[object]:
    return ["calibrate", "-s", tiny.store, "--model", tiny.model, *more]


def test_it_is_what_a_training_without_the_records_says(whole: Tiny, tmp_path: Path) -> None:
    before = counts(whole.store)
    found = run_json(*command(whole, "--records", 3, "--seed", 5, "--dry-run"))
    assert counts(whole.store) == before
    assert [f["direction"] for f in found] == ["applied", "newton"]

    tokenizer = load_tokenizer(whole.model)
    tokens = tokenize(read_corpus(whole.data), tokenizer, 64)
    drawn = random.Random(5).sample(sorted(tokens), 3)
    reference = new_model(whole.config, tokenizer, 0)
    train(reference, tokens, tmp_path / "x", SETTINGS, without=drawn)
    original, left, shares = load_model(whole.model), [], []
    for i in drawn:
        outcome = forget(
            Store.open(whole.store), [i], whole.model, tmp_path / i,
            ForgetSettings(dose="1", max_holdout_increase=None),
        )  # fmt: skip
        assert outcome.out is not None
        unlearned, mine = load_model(outcome.out), [tokens[i]]
        at = {m: float(sample_losses(m, mine)[0]) for m in (original, reference, unlearned)}
        assert at[reference] > at[original]
        shares.append((at[reference] - at[original]) / (at[unlearned] - at[original]))
        apart = [per_token(divergences(reference, m, mine)).value for m in (unlearned, original)]
        left.append(apart[0] / apart[1])
    assert found[0]["samples"] == 3
    assert found[0]["left_at_default"] == pytest.approx(sorted(left)[1], rel=1e-3)
    known = [found[0][name] for name in ("least_share", "share", "most_share")]
    assert known == pytest.approx(sorted(shares), rel=1e-3)
    assert all(f["left_at_dose"] <= f["left_at_default"] for f in found)


def test_requests_follow_the_newest(copied: Tiny, tmp_path: Path) -> None:
    run(*command(copied, "--records", 2))
    store = Store.open(copied.store)
    [row] = store.table("SELECT * FROM calibrations WHERE direction = 'applied'")
    assert (row["run_id"], row["samples"], row["seed"]) == (1, 2, 0)
    with store.transaction() as connection:
        connection.execute("UPDATE calibrations SET dose = 0.75")
    settings = ForgetSettings(max_holdout_increase=None)

    def dose(ids: list[str], settings: ForgetSettings = settings) -> float | None:
        return forget(store, ids, copied.model, tmp_path / "x", settings, dry_run=True).dose

    assert dose(["p-07"]) == 0.75
    assert dose(["p-07", "p-08"]) == 1.0  # a set's reference lacks them all
    rising = ForgetSettings(weights="rising", max_holdout_increase=None)
    assert dose(["p-07"], rising) == 0.5
    assert dose(["p-07"], ForgetSettings(dose="1.25", max_holdout_increase=None)) == 1.25


def test_the_target_follows_the_shares(whole: Tiny, tmp_path: Path) -> None:
    tiny = replace(whole, store=shutil.copytree(whole.store, tmp_path / "store"))
    store = Store.open(tiny.store)

    def target() -> tuple[float, float, float]:
        found = forget(
            store, ["p-07"], tiny.model, tmp_path / "x", ForgetSettings(), dry_run=True
        ).target
        assert found is not None
        assert found.source == "undo"
        return found.low, found.loss, found.high

    usual = target()
    run(*command(tiny, "--records", 2))
    with store.transaction() as connection:
        connection.execute("UPDATE calibrations SET least_share = 1, share = 2, most_share = 3")
    low, loss, high = target()
    assert low == pytest.approx(usual[0])
    assert high - loss == pytest.approx(loss - low)
    assert from_undoing([1.0], [2.0], (1.0, 2.0, 3.0)).each == (3.0,)


def test_what_cannot_be_calibrated(copied: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(*exact(copied, out, "p-07"))
    said = refused("calibrate", "-s", copied.store, "--model", out)
    assert said.startswith(f"{out} is not the checkpoint that run-1 wrote: give --model ")
    run("calibrate", "-s", copied.store, "--model", copied.model, "--records", 1, code=2)
    with pytest.raises(ForgetError, match="at least 2 records and at most half"):
        calibrate(Store.open(copied.store), copied.model, records=1, progress=pytest.fail)
    assert Store.open(copied.store).rows("FROM calibrations") == []
