"""What came after a record was met: learning rates, and how firmly they held the model."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from statistics import mean

import pytest
from models import samples, tiny

from gradstore import GradStoreCallback, Store
from gradstore.training.ingest import TrainingSettings, train
from gradstore.training.model import load_model
from gradstore.unlearn.controls import gradients
from gradstore.unlearn.exposures import Met, held_after, recomputed, stored
from gradstore.unlearn.held import Held
from gradstore.unlearn.newton import newton

SETTINGS = TrainingSettings(epochs=4, batch_size=3, learning_rate=1e-2, save_checkpoints=True)


def trained(folder: Path, captured: str, runs: int = 1) -> tuple[Store, dict[str, int]]:
    store, tokens = Store.create(folder / "store"), samples(7)
    for number in range(runs):
        with GradStoreCallback(store, epochs_captured=captured) as callback:
            train(tiny(seed=number), tokens, folder / f"out{number}", SETTINGS, [callback])
    store.refresh()
    return store, store.resolve(list(tokens))


def alike(
    met: Met, held: Mapping[int, float], store: Store, own: Mapping[int, float] | None = None
) -> bool:
    """Whether an exposure has the sums that a loop over the steps after it makes."""
    run_id = store.run()["run_id"]
    known = [
        e
        for e in store.table("FROM exposures JOIN samples USING (sample_id)")
        if e["run_id"] == run_id
    ]
    epochs = sorted({e["epoch"] for e in known})

    def before(epoch: int) -> int:
        return int(max((e for e in epochs if e <= epoch), default=epochs[0]))

    def size(epoch: int) -> float:
        of = [e["d_norm"] for e in known if e["epoch"] == before(epoch)]
        changed = own[epoch] / own[before(epoch)] if own else 1.0
        return float(mean(norm**2 for norm in of if isfinite(norm))) * changed

    def firmness(epoch: int) -> float:
        of = [e for e in known if e["epoch"] == before(epoch)]
        counted = sum(e["batch_share"] * e["grad_scale"] * e["scored_tokens"] for e in of)
        return float(counted / len({e["step"] for e in of}) * size(epoch) / size(SETTINGS.epochs))

    steps = store.rows("SELECT step, epoch, learning_rate FROM steps WHERE run_id = ?", [run_id])
    own_steps = [step for step, epoch, _ in steps if epoch == met.epoch]
    if exact := [e["step"] for e in known if (e["id"], e["epoch"]) == (met.id, met.epoch)]:
        own_steps = exact
    assert sorted(met.steps) == sorted(own_steps)
    rates = mean(sum(r for s, _, r in steps if s > step) for step in own_steps)
    firm = [sum(r * firmness(e) for s, e, r in steps if s > step) for step in own_steps]
    return met.after == pytest.approx(rates) and [held[s] for s in own_steps] == pytest.approx(firm)


@pytest.mark.parametrize(("captured", "runs"), [("all", 2), ("first", 1), ("2,4", 1)])
def test_what_came_after_is_summed_over_the_steps(tmp_path: Path, captured: str, runs: int) -> None:
    store, numbers = trained(tmp_path, captured, runs)
    run, some = store.run(), list(numbers.values())[:3]
    met, held = list(stored(store, run, some)), held_after(store, run)
    saved = sorted((tmp_path / f"out{runs - 1}" / "checkpoints").glob("checkpoint-*"))
    more = [] if captured == "all" else list(recomputed(store, run, some, saved[:2]))
    assert sorted(m.epoch for m in met + more) == sorted([1, 2, 3, 4] * 3)
    assert all(alike(each, held, store) for each in met + more)
    if captured == "first":  # nothing tells how gradients changed
        [counted] = {round(held[s] / m.after, 6) for m in met for s in m.steps}  # type: ignore[operator]
        assert counted > 0


@pytest.mark.parametrize("captured", ["first", "2,4"])
def test_gradients_of_some_tell_how_those_of_all_changed(tmp_path: Path, captured: str) -> None:
    store, numbers = trained(tmp_path, captured)
    run, own = store.run(), {1: 9.0, 2: 5.0, 3: 2.0, 4: 1.0}
    held = held_after(store, run, own)
    assert all(alike(met, held, store, own) for met in stored(store, run, [*numbers.values()][:3]))
    assert held[1] > held_after(store, run)[1]
    assert held_after(store, run, {}) == held_after(store, run)


def test_newton_by_checkpoints_is_held_as_its_own_gradients_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, numbers = trained(tmp_path, "first")
    run, [mine, *others] = store.run(), list(numbers.values())
    saved = list((tmp_path / "out0" / "checkpoints").glob("checkpoint-*"))
    [last] = [path for path in saved if path.name == "checkpoint-12"]
    told: list[Mapping[int, float] | None] = []
    monkeypatch.setattr(
        "gradstore.unlearn.newton.held_after",
        lambda *a: told.append(a[2]) or held_after(*a),  # type: ignore[func-returns-value]
    )
    for checkpoints in (saved, []):
        newton(
            store, run, [mine], load_model(last), Held(others=others), checkpoints,
            ["embedding", "position"],
        )  # fmt: skip
    [own, none] = told
    assert none is None
    assert own is not None
    text = list(store.tokens([mine], run["run_id"]).values())
    for epoch, step in ((1, None), (4, last)):
        if step is None:
            [met] = stored(store, run, [mine], ["embedding", "position"])
            found = {name: of.dense() for name, of in met.gradients.items()}
        else:
            found = gradients(load_model(step), text, ["embedding", "position"])
        expected = sum(float(of.square().sum()) for of in found.values())
        assert own[epoch] == pytest.approx(expected, rel=1e-3)


def test_norms_that_are_none_leave_sums_that_are_numbers(tmp_path: Path) -> None:
    store, numbers = trained(tmp_path, "all")
    with store.transaction() as connection:
        connection.execute("UPDATE exposures SET d_norm = 'inf' WHERE epoch = 2 AND step % 2 = 0")
    run, some = store.run(), list(numbers.values())[:2]
    held = held_after(store, run)
    assert all(alike(met, held, store) for met in stored(store, run, some))
    with store.transaction() as connection:
        connection.execute("UPDATE exposures SET d_norm = 0 WHERE epoch = 4")
    held = held_after(store, run)
    for met in stored(store, run, some):
        [step] = met.steps
        assert isfinite(held[step])
        assert (held[step] > 0) == (met.after > 0)  # type: ignore[operator]
