"""Directions that samples which stay have a part in: their epochs, who holds them, their limits."""

from __future__ import annotations

import math
from pathlib import Path

import models
import pytest
import torch
from tiny import Tiny, refused, run

from gradstore import Store
from gradstore.evaluate import audience as audiences
from gradstore.evaluate import neighbours
from gradstore.evaluate.audience import Audience
from gradstore.evaluate.neighbours import most_exposed, nearest_first
from gradstore.training.model import load_model
from gradstore.unlearn.applied import applied
from gradstore.unlearn.dose import Limits, Point
from gradstore.unlearn.exposures import stored
from gradstore.unlearn.find import find
from gradstore.unlearn.firmness import held_after
from gradstore.unlearn.forget import ForgetSettings, forget
from gradstore.unlearn.held import Held

pytest_plugins = ["tiny"]
IDS = ["p-07", "p-11"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audiences, "RETAINED_MEASURED", 4)
    monkeypatch.setattr(neighbours, "NEIGHBOURS_MEASURED", 3)


def test_newton_takes_chosen_epochs(trained: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    store, network = Store.open(trained.store), load_model(trained.model)
    run_, numbers = store.run(), list(store.resolve(IDS).values())
    held = list(store.resolve(["p-01", "p-03"]).values())
    monkeypatch.setattr("gradstore.unlearn.newton.HOLD", 0.0)  # nothing holds
    firm = held_after(store, run_)
    for epochs in ("1", "2", "all"):
        found = find(
            "newton", store, run_, numbers, network, held=Held(others=held), weights=None, seed=0,
            epochs=epochs,
        )  # fmt: skip
        wanted = ("1", "2") if epochs == "all" else (epochs,)
        met = [(p, e, stored(store, run_, [p], epochs=e)) for p in numbers for e in wanted]
        own = [(p, e, each.learning_rate, firm[each.steps[0]]) for p, e, [each] in met]
        c = sum(rate * of for *_, rate, of in own) / sum(rate for *_, rate, _ in own)
        expected = torch.zeros_like(found.update)
        for person, epoch, _, of in own:
            one = applied(store, run_, [person], "uniform", epochs=epoch)
            expected += one.update * 2 * math.exp(-of / c)
        assert found.exposures == 2 * len(wanted)
        assert models.relative(found.update, expected) < 2e-2


@pytest.mark.parametrize("weights", ["washed", "rising"])
def test_orthogonal_takes_chosen_epochs_and_weights(weights: str, trained: Tiny) -> None:
    store, network = Store.open(trained.store), load_model(trained.model)
    run_, numbers = store.run(), list(store.resolve(IDS).values())
    held = list(store.resolve(["p-01"]).values())
    found = find(
        "orthogonal", store, run_, numbers, network, held=Held(others=held),
        weights=weights, seed=0, epochs="2",
    )  # fmt: skip
    start = applied(store, run_, numbers, weights, epochs="2")
    assert (found.dose, found.exposures, found.weights) == (start.dose, 2, weights)
    *_, last = store.records(held, run_["run_id"])
    gradient = last.gradient(store.model).dense()
    along = [float((gradient * each.update).sum()) for each in (found, start)]
    assert abs(along[0]) < 1e-3 * abs(along[1])
    taken = start.update - found.update  # in the optimizer's metric the held gradient, and no more
    kept = store.moments(run_["run_id"], "embedding", "end")
    assert kept is not None
    root = (kept[0] / (1 - 0.999**12)).sqrt() + 1e-8
    cosine = torch.cosine_similarity((taken * root).flatten(), gradient.flatten(), dim=0)
    assert abs(float(cosine)) > 0.999


@pytest.mark.usefixtures("few")
def test_those_hit_most_hold_the_direction_first(trained: Tiny) -> None:
    store = Store.open(trained.store)
    run_, samples = store.run(), store.resolve(["p-07"])
    update = applied(store, run_, list(samples.values())).update
    audience = Audience.choose(store, run_, samples, 0)
    others = audience.others(store, run_)
    assert nearest_first(audience, store, run_, update, 5, 0) == most_exposed(
        store, run_, update, others, 5
    )
    everyone = nearest_first(audience, store, run_, update, 99, 0)
    assert everyone[: len(others)] == most_exposed(store, run_, update, others, 99)
    measured = {audience.numbers[audience.members[at][0]] for at in audience.of("retained")}
    assert set(everyone[len(others) :]) == measured
    assert not set(everyone) & set(samples.values())


@pytest.mark.usefixtures("few")
def test_orthogonal_spares_them(copied: Tiny, tmp_path: Path) -> None:
    with Store.open(copied.store) as store:
        run_, samples = store.run(), store.resolve(["p-07"])
        update = applied(store, run_, list(samples.values())).update
        rises = {}
        for kind in ("applied", "orthogonal"):
            asked = ForgetSettings(direction=kind, dose="0.1", max_holdout_increase=None)
            out = tmp_path / kind
            forget(store, ["p-07"], copied.model, out, asked)
            moved = load_model(out).get_input_embeddings().weight.detach()
            moved = moved - load_model(copied.model).get_input_embeddings().weight.detach()
            others = Audience.choose(store, run_, samples, 0).others(store, run_)
            rises[kind] = [
                abs(float((record.gradient(store.model).dense() * moved).sum()))
                for record in store.records(most_exposed(store, run_, update, others, 3),
                                            run_["run_id"])
                if record.exposure.epoch == 2
            ]  # fmt: skip
    assert max(rises["orthogonal"]) < 0.05 * min(rises["applied"])


def test_a_limit_on_neighbours() -> None:
    start = Point(0.0, 1.0, None, 2.0, neighbours=1.0)
    limits = Limits(neighbours=0.5)
    assert limits.allow(Point(1.0, 2.0, None, 9.0, 9.0, neighbours=1.5), start)
    assert not limits.allow(Point(1.0, 2.0, None, 2.0, 0.0, neighbours=1.6), start)
    assert limits.allow(Point(1.0, 2.0, None, 2.0), start)  # nobody was measured


@pytest.mark.usefixtures("few")
def test_the_command_stops_at_it(copied: Tiny, tmp_path: Path) -> None:
    asked = ["forget", "p-07", "-s", copied.store, "--model", copied.model, "--out",
             tmp_path / "out", "--direction", "applied", "--dose", 5]  # fmt: skip
    limit = ["--max-neighbour-increase", 0.05, "--max-holdout-increase", 9]
    result = run(*asked, *limit, code=3)
    assert "stopped at the limits: held-out loss +9, neighbours' loss +0.05" in result.stderr
    store = Store.open(copied.store)
    [(change,)] = store.rows("SELECT change FROM collateral WHERE role = 'neighbour'")
    assert 0 < change <= 0.05
    assert "or limits" in refused(*asked[:8], "--exact", *limit[:2], code=2)
