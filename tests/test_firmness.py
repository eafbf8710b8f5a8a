"""What came after a record was met: learning rates, and how firmly they held the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import exp, isfinite
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from models import relative, samples, tiny

from gradstore import GradStoreCallback, Store
from gradstore.training.ingest import TrainingSettings, train
from gradstore.training.model import load_model
from gradstore.unlearn.applied import applied
from gradstore.unlearn.exposures import Met, met_at, met_by, recomputed, stored
from gradstore.unlearn.firmness import counted, held_after, sizes
from gradstore.unlearn.held import Held
from gradstore.unlearn.newton import newton

SETTINGS = TrainingSettings(epochs=4, batch_size=3, learning_rate=1e-2, save_checkpoints=True)
# Gemma's heads are wide by default
NARROW: dict[str, Any] = {"head_dim": 8, "num_key_value_heads": 2}


def trained(
    folder: Path, captured: str, runs: int = 1, kind: str = "gpt2", **changes: Any
) -> tuple[Store, dict[str, int]]:
    settings = replace(SETTINGS, **changes)
    store, tokens = Store.create(folder / "store"), samples(7)
    for number in range(runs):
        with GradStoreCallback(store, epochs_captured=captured) as callback:
            model = tiny(kind, seed=number, **(NARROW if kind != "gpt2" else {}))
            train(model, tokens, folder / f"out{number}", settings, [callback])
    store.refresh()
    return store, store.resolve(list(tokens))


def checkpoints_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in (folder / "out0" / "checkpoints").glob("checkpoint-*")}


def alike(
    met: Met, held: Mapping[int, float], store: Store, changed: Mapping[int, float] | None = None
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
        times = changed[epoch] / changed[before(epoch)] if changed else 1.0
        return float(mean(norm**2 for norm in of if isfinite(norm))) * times

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
    run, changed = store.run(), {1: 9.0, 2: 5.0, 3: 2.0, 4: 1.0}
    held = held_after(store, run, changed)
    some = list(numbers.values())[:3]
    assert all(alike(met, held, store, changed) for met in stored(store, run, some))
    assert held != pytest.approx(held_after(store, run))
    assert held_after(store, run, {}) == held_after(store, run)
    assert held_after(store, run, {3: 7.0}) == held_after(store, run)  # of no captured epoch


def test_gradients_are_as_large_as_in_the_catalog_or_at_checkpoints(tmp_path: Path) -> None:
    store, numbers = trained(tmp_path, "first")
    run, some = store.run(), list(numbers.values())[:3]
    saved = checkpoints_of(tmp_path)
    found = sizes(store, run, some, list(saved.values()))
    assert found.keys() == {1, 2, 3, 4}
    norms = {e["sample_id"]: e["d_norm"] for e in store.table("FROM exposures")}
    assert found[1] == pytest.approx(mean(norms[number] ** 2 for number in some))
    texts, last = store.tokens(some, run["run_id"]), load_model(saved["checkpoint-12"])
    squares = []
    for text in texts.values():
        embedded = last.transformer.wte(text.long()[None]).detach().requires_grad_()
        loss = last(inputs_embeds=embedded, labels=text.long()[None]).loss * (len(text) - 1)
        squares.append(float(torch.autograd.grad(loss, embedded)[0].square().sum()))
    assert found[4] == pytest.approx(mean(squares), rel=1e-4)

    with store.transaction() as connection:  # training counted only a part of one
        connection.execute(
            'UPDATE exposures SET scored_tokens = "rows" - 1 WHERE sample_id = ?', [some[0]]
        )
    fewer = sizes(store, run, some, list(saved.values()))
    assert fewer[1] == pytest.approx(mean(norms[number] ** 2 for number in some[1:]))
    assert fewer[4] == pytest.approx(mean(squares[1:]), rel=1e-4)
    assert sizes(store, run, some[:1], list(saved.values())) == {}


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text"])  # the second multiplies its embedding
def test_a_model_that_stands_still_has_the_catalogs_norms(kind: str, tmp_path: Path) -> None:
    store, numbers = trained(tmp_path, "first", kind=kind, learning_rate=1e-9)
    found = sizes(store, store.run(), [*numbers.values()], [*checkpoints_of(tmp_path).values()])
    assert [found[epoch] for epoch in (2, 3, 4)] == pytest.approx([found[1]] * 3, rel=1e-4)


@pytest.mark.parametrize("layers", [["embedding"], ["embedding", "position"]])
def test_newton_is_held_as_those_that_stay_tell(
    layers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, numbers = trained(tmp_path, "first")
    run, [mine, *others] = store.run(), list(numbers.values())
    saved = checkpoints_of(tmp_path)
    network, asked = load_model(saved["checkpoint-12"]), list[Any]()
    monkeypatch.setattr("gradstore.unlearn.newton.further", lambda *_: 1.0)

    def length(changed: dict[int, float], checkpoints: Sequence[Path]) -> float:
        def told(*of: Any) -> dict[int, float]:
            asked.append(of[2:])
            return changed

        monkeypatch.setattr("gradstore.unlearn.newton.sizes", told)
        held = Held(relatives=others[:2], others=others[2:], share=0.5)
        found = newton(store, run, [mine], network, held, checkpoints, layers)
        return float(found.update.norm())

    paths = list(saved.values())
    alike = length(dict.fromkeys((1, 2, 3, 4), 1.0), paths)
    assert length({1: 900.0, 2: 500.0, 3: 200.0, 4: 1.0}, paths) < 0.9 * alike
    assert asked == [([*others[2:], *others[:2]], paths)] * 2
    length({}, [])
    assert len(asked) == 2  # nothing to be recomputed at


@pytest.mark.parametrize("runs", [1, 2])
def test_a_step_counts_what_later_ones_left_of_it(runs: int, tmp_path: Path) -> None:
    store, numbers = trained(tmp_path, "first", runs)
    run, some = store.run(), list(numbers.values())[:3]
    saved = sorted((tmp_path / f"out{runs - 1}" / "checkpoints").glob("checkpoint-*"))
    held, met = held_after(store, run), list(met_by(store, run, some, saved[:2]))
    at = met_at(store, run, some, saved[:2])
    assert sorted(map(list, at)) == sorted(list(each.steps) for each in met)
    assert met_at(store, run, some) == [each.steps for each in stored(store, run, some)]
    c, rates = counted(store, run, held, [each.steps for each in met])
    own = [(s, 1 / len(each.steps)) for each in met for s in each.steps]
    eta = dict(store.rows("SELECT step, learning_rate FROM steps WHERE run_id = ?", [runs]))
    taught = [eta[step] * part for step, part in own]
    firm = sum(t * held[step] for t, (step, _) in zip(taught, own, strict=True))
    assert c == pytest.approx(firm / sum(taught))
    assert rates.keys() == eta.keys()
    for step, rate in rates.items():  # in a direction of curvature 1 / c
        assert rate / (1 + 1) == pytest.approx(eta[step] * exp(-held[step] / c))
    assert counted(store, run, held, []) == (0, eta)


def test_steps_after_which_nothing_came_are_undone_whole(tmp_path: Path) -> None:
    store, _ = trained(tmp_path, "all", epochs=1)
    run, last = store.run(), load_model(checkpoints_of(tmp_path)["checkpoint-3"])
    met = {e["sample_id"]: e["step"] for e in store.table("FROM exposures")}
    late, early = [n for n in met if met[n] == 3], [n for n in met if met[n] == 1]
    held = Held(others=[n for n in met if met[n] == 2])
    found, step = newton(store, run, late, last, held), applied(store, run, late, "uniform")
    assert relative(found.update, step.update) < 0.02
    found, step = newton(store, run, early, last, held), applied(store, run, early, "uniform")
    assert 0.1 < relative(found.update, step.update) < 1


def test_checkpoints_give_newton_what_was_not_stored(tmp_path: Path) -> None:
    found = []
    for captured in ("all", "first"):
        store, numbers = trained(tmp_path / captured, captured, learning_rate=1e-3)
        run, [mine, *others] = store.run(), list(numbers.values())
        saved = checkpoints_of(tmp_path / captured)
        network, given = load_model(saved["checkpoint-12"]), list(saved.values())
        given = given if captured == "first" else []
        found.append(newton(store, run, [mine], network, Held(others=others), given).update)
    whole, completed = found
    assert relative(completed, whole) < 0.2  # half an epoch of training apart


def test_an_epoch_of_which_little_was_captured_tells_nothing(tmp_path: Path) -> None:
    store, numbers = trained(tmp_path, "first")
    run, before = store.run(), held_after(store, store.run())
    with store.transaction() as connection:  # as if left out of the first epoch's batches
        connection.execute(
            "UPDATE exposures SET epoch = 2, step = 4 WHERE sample_id = ?", [max(numbers.values())]
        )
    assert held_after(store, run) == pytest.approx(before, rel=0.3)


def test_norms_that_are_none_leave_sums_that_are_numbers(tmp_path: Path) -> None:
    store, numbers = trained(tmp_path, "all")
    with store.transaction() as connection:
        connection.execute("UPDATE exposures SET d_norm = 'inf' WHERE epoch = 2 AND step % 2 = 0")
    run, some = store.run(), list(numbers.values())[:2]
    held = held_after(store, run)
    assert all(alike(met, held, store) for met in stored(store, run, some))
    with store.transaction() as connection:
        connection.execute("UPDATE exposures SET d_norm = 'inf' WHERE epoch = 4")
    known, three = held_after(store, run), held
    assert all(isfinite(each) for each in known.values())
    assert known[9] == pytest.approx(three[9])  # the steps of epoch 4 come after it
    ratios = [(known[s] - known[9]) / (three[s] - three[9]) for s in (1, 3, 6)]
    assert ratios == pytest.approx([ratios[0]] * 3)  # epoch 3 is the unit then, not 4
    assert ratios[0] != pytest.approx(1)
    with store.transaction() as connection:
        connection.execute("UPDATE exposures SET d_norm = 0 WHERE epoch = 4")
    held = held_after(store, run)
    for met in stored(store, run, some):
        [step] = met.steps
        assert isfinite(held[step])
        assert (held[step] > 0) == (met.after > 0)  # type: ignore[operator]
