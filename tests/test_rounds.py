"""Iterative unlearning takes each round's own gradients, and goes on where it was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import Tiny

from gradstore import Store
from gradstore.errors import SettingsError
from gradstore.unlearn import rounds
from gradstore.unlearn.direction import raw
from gradstore.unlearn.forget import ForgetSettings, forget
from gradstore.unlearn.request import Outcome

pytest_plugins = ["tiny"]
IDS = ["p-07", "p-11"]
WEIGHT = "transformer.wte.weight"


def settings(kind: str, count: int = 3, **changes: Any) -> ForgetSettings:
    asked: dict[str, Any] = {"dose": "target:3.4", "max_holdout_increase": None} | changes
    return ForgetSettings(direction=kind, iterate=count, **asked)


def run(tiny: Tiny, out: Path, asked: ForgetSettings, **more: Any) -> Outcome:
    with Store.open(tiny.store) as store:
        return forget(store, IDS, tiny.model, out, asked, **more)


def moved(tiny: Tiny, out: Path) -> torch.Tensor:
    old, new = (load_file(folder / "model.safetensors")[WEIGHT] for folder in (tiny.model, out))
    return new - old


@pytest.mark.parametrize("kind", ["raw", "fresh"])
def test_each_round_goes_its_part_of_the_way(kind: str, copied: Tiny, tmp_path: Path) -> None:
    talk: list[str] = []
    outcome = run(copied, tmp_path / "out", settings(kind), progress=talk.append)
    begin = outcome.path[0].forget
    said = [float(line.split()[-4]) for line in talk if line.startswith("round ")]
    assert said == pytest.approx([begin + (3.4 - begin) * n / 3 for n in (1, 2, 3)], abs=0.02)
    after = [s.after for s in outcome.scores if s.role == "forget"]
    assert sum(after) / len(after) == pytest.approx(said[-1], abs=1e-3)
    assert (outcome.dose, outcome.verdict) == (1.0, "forgotten")
    assert not list((copied.store / "unfinished").iterdir())
    with Store.open(copied.store) as store:
        [(text,)] = store.rows("SELECT settings->>'iterate' FROM requests")
    assert text == "3"


def test_rounds_of_raw_take_the_next_stored_epoch(copied: Tiny, tmp_path: Path) -> None:
    run(copied, tmp_path / "out", settings("raw"))
    with Store.open(copied.store) as store:
        of_run, numbers = store.run(), list(store.resolve(IDS).values())
        assert [row[0] for row in store.rows("SELECT DISTINCT epoch FROM gradients")] == [1, 2]
        first, second, again = (
            raw(store, of_run, numbers, epochs=e).update.flatten() for e in ("1", "2", "1")
        )
    assert torch.equal(first, again)
    basis = torch.stack([first, second]).T
    found = torch.linalg.lstsq(basis, moved(copied, tmp_path / "out").flatten()[:, None])
    rest = moved(copied, tmp_path / "out").flatten() - (basis @ found.solution).flatten()
    assert float(rest.norm()) < 1e-3 * float(moved(copied, tmp_path / "out").norm())
    assert bool((found.solution > 0).all())


def test_samples_without_an_epoch_in_common_take_their_first(copied: Tiny, tmp_path: Path) -> None:
    with Store.open(copied.store) as store, store.transaction() as connection:
        for sample, epoch in zip(IDS, (1, 2), strict=True):
            connection.execute(
                """DELETE FROM exposures WHERE epoch = ? AND sample_id =
                   (SELECT sample_id FROM samples WHERE id = ?)""",
                [epoch, sample],
            )
    outcome = run(copied, tmp_path / "out", settings("raw", 2))
    assert outcome.verdict == "forgotten"


def test_what_is_met_already_is_refused(copied: Tiny, tmp_path: Path) -> None:
    talk: list[str] = []
    outcome = run(
        copied, tmp_path / "out", settings("raw", dose="target:0.1"), progress=talk.append
    )
    assert outcome.verdict == "refused"
    assert not any(line.startswith("round ") for line in talk)


def test_an_interrupted_request_goes_on(
    copied: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = settings("fresh")
    run(copied, tmp_path / "whole", whole)
    keep, kept = rounds._keep, []

    def interrupted(*arguments: Any) -> None:
        keep(*arguments)
        kept.append(arguments)
        if len(kept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "_keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(copied, tmp_path / "parts", whole)
    assert not (tmp_path / "parts").exists()
    monkeypatch.setattr(rounds, "_keep", keep)
    talk: list[str] = []
    run(copied, tmp_path / "parts", whole, progress=talk.append)
    assert any(line.startswith("going on after round 2 of 3") for line in talk)
    assert [line[:7] for line in talk if line.startswith("round")] == ["round 3"]
    assert torch.allclose(moved(copied, tmp_path / "parts"), moved(copied, tmp_path / "whole"))


def test_only_the_same_request_goes_on(
    copied: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = rounds._keep

    def interrupted(*arguments: Any) -> None:
        keep(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "_keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(copied, tmp_path / "out", settings("raw"))
    monkeypatch.setattr(rounds, "_keep", keep)
    for other in (
        settings("raw", 2),
        settings("fresh"),
        settings("raw", dose="target:3.3"),
        settings("raw", max_holdout_increase=0.001),  # less than the first round's damage
    ):
        talk: list[str] = []
        run(copied, tmp_path / "out", other, dry_run=True, progress=talk.append)
        assert not any(line.startswith("going on") for line in talk)
    [kept] = (copied.store / "unfinished").iterdir()
    kept.write_bytes(b"no safetensors")
    run(copied, tmp_path / "out", settings("raw"))
    assert not list((copied.store / "unfinished").iterdir())


def test_the_limit_ends_the_rounds(copied: Tiny, tmp_path: Path) -> None:
    talk: list[str] = []
    asked = settings("fresh", 4, dose="target:9", max_holdout_increase=0.05)
    outcome = run(copied, tmp_path / "new" / "out", asked, progress=talk.append)
    assert outcome.verdict == "partly"
    start, chosen = outcome.path[0], next(p for p in outcome.path if p.dose == outcome.dose)
    assert start.holdout is not None
    assert chosen.holdout is not None
    assert 0.02 < chosen.holdout - start.holdout <= 0.05
    assert len([line for line in talk if line.startswith("round ")]) < 4


def test_a_dry_run_writes_nothing(copied: Tiny, tmp_path: Path) -> None:
    outcome = run(copied, tmp_path / "out", settings("raw", 2), dry_run=True)
    assert outcome.verdict == "forgotten"
    assert outcome.request_id is None
    assert not (tmp_path / "out").exists()
    assert not (copied.store / "unfinished").exists()


@pytest.mark.parametrize("kind", [None, "applied", "newton", "random"])
def test_what_has_no_rounds_is_refused(kind: str | None, copied: Tiny, tmp_path: Path) -> None:
    asked = ForgetSettings(direction=kind, iterate=2)
    with pytest.raises(SettingsError, match="--iterate takes the next stored epoch's gradients"):
        run(copied, tmp_path / "out", asked)
