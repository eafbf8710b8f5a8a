"""What came after a record was met: learning rates, and how firmly they held the model."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from statistics import mean

import pytest
from models import samples, tiny

from gradstore import GradStoreCallback, Store
from gradstore.training.ingest import TrainingSettings, train
from gradstore.unlearn.exposures import Met, recomputed, stored

SETTINGS = TrainingSettings(epochs=4, batch_size=3, learning_rate=1e-2, save_checkpoints=True)


def trained(folder: Path, captured: str, runs: int = 1) -> tuple[Store, dict[str, int]]:
    store, tokens = Store.create(folder / "store"), samples(7)
    for number in range(runs):
        with GradStoreCallback(store, epochs_captured=captured) as callback:
            train(tiny(seed=number), tokens, folder / f"out{number}", SETTINGS, [callback])
    store.refresh()
    return store, store.resolve(list(tokens))


def alike(met: Met, store: Store) -> bool:
    """Whether an exposure has the sums that a loop over the steps after it makes."""
    run_id = store.run()["run_id"]
    known = [
        e
        for e in store.table("FROM exposures JOIN samples USING (sample_id)")
        if e["run_id"] == run_id
    ]
    epochs = sorted({e["epoch"] for e in known})

    def size(epoch: int) -> float:
        of = [e["d_norm"] for e in known if e["epoch"] == epoch]
        return float(mean(norm**2 for norm in of if isfinite(norm)))

    def firmness(epoch: int) -> float:
        captured = max((e for e in epochs if e <= epoch), default=epochs[0])
        of = [e for e in known if e["epoch"] == captured]
        counted = sum(e["batch_share"] * e["grad_scale"] * e["scored_tokens"] for e in of)
        a_step = counted / len({e["step"] for e in of})
        return float(a_step * size(captured) / size(epochs[-1]))

    steps = store.rows("SELECT step, epoch, learning_rate FROM steps WHERE run_id = ?", [run_id])
    own = [step for step, epoch, _ in steps if epoch == met.epoch]
    if exact := [e["step"] for e in known if (e["id"], e["epoch"]) == (met.id, met.epoch)]:
        own = exact
    rates = mean(sum(r for s, _, r in steps if s > step) for step in own)
    held = mean(sum(r * firmness(e) for s, e, r in steps if s > step) for step in own)
    return met.after == pytest.approx(rates) and met.held == pytest.approx(held)


@pytest.mark.parametrize(("captured", "runs"), [("all", 2), ("first", 1), ("2,4", 1)])
def test_what_came_after_is_summed_over_the_steps(tmp_path: Path, captured: str, runs: int) -> None:
    store, numbers = trained(tmp_path, captured, runs)
    run, some = store.run(), list(numbers.values())[:3]
    met = list(stored(store, run, some))
    saved = sorted((tmp_path / f"out{runs - 1}" / "checkpoints").glob("checkpoint-*"))
    more = [] if captured == "all" else list(recomputed(store, run, some, saved[:2]))
    assert sorted(m.epoch for m in met + more) == sorted([1, 2, 3, 4] * 3)
    assert all(alike(each, store) for each in met + more)
    if captured == "first":  # nothing tells how gradients changed
        counted = met[0].held / met[0].after  # type: ignore[operator]
        assert all(each.held == pytest.approx(each.after * counted) for each in met)  # type: ignore[operator]


def test_norms_that_are_none_leave_sums_that_are_numbers(tmp_path: Path) -> None:
    store, numbers = trained(tmp_path, "all")
    with store.transaction() as connection:
        connection.execute("UPDATE exposures SET d_norm = 'inf' WHERE epoch = 2 AND step % 2 = 0")
    run, some = store.run(), list(numbers.values())[:2]
    assert all(alike(met, store) for met in stored(store, run, some))
    with store.transaction() as connection:
        connection.execute("UPDATE exposures SET d_norm = 0 WHERE epoch = 4")
    for met in stored(store, run, some):
        assert met.held is not None
        assert isfinite(met.held)
        assert (met.held > 0) == (met.after > 0)  # type: ignore[operator]
