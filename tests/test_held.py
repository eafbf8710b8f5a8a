"""Which samples hold a direction: those that share rare tokens with the forgotten, and others."""

from __future__ import annotations

from collections import Counter

import pytest
from models import relative
from tiny import Tiny

from gradstore import Store
from gradstore.evaluate.audience import Audience
from gradstore.training.model import load_model
from gradstore.unlearn.held import Held, hold, kinship
from gradstore.unlearn.newton import newton

pytest_plugins = ["tiny"]


def test_kinship_is_what_counting_by_hand_gives(trained: Tiny) -> None:
    store = Store.open(trained.store)
    run, everyone = store.run(), everyone_of(store)
    mine, others = everyone[:2], everyone[2:]
    tokens = {n: set(t.tolist()) for n, t in store.tokens(everyone, run["run_id"]).items()}
    common = tokens[mine[0]] | tokens[mine[1]]
    frequency = Counter(token for number in others for token in tokens[number])
    expected = [sum(1 / frequency[t] for t in tokens[number] & common) for number in others]
    assert kinship(store, run, mine, others).tolist() == pytest.approx(expected)
    assert len(set(expected)) > 1


def test_half_of_those_held_are_the_nearest_and_nobody_measured(
    trained: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstore.evaluate.audience.RETAINED_MEASURED", 3)
    store = Store.open(trained.store)
    run, everyone = store.run(), everyone_of(store)
    [(name,)] = store.rows("SELECT id FROM samples WHERE sample_id = ?", [everyone[0]])
    audience = Audience.choose(store, run, {name: everyone[0]}, 0)
    free = audience.others(store, run)
    held = hold(audience, store, run, everyone[:1], 4, seed=0)
    kin = dict(zip(free, kinship(store, run, everyone[:1], free).tolist(), strict=True))
    assert len(held.relatives) == len(held.others) == 2
    assert not {*held.relatives} & {*held.others}
    assert {*held.everyone} <= {*free}
    assert min(kin[n] for n in held.relatives) >= max(
        kin[n] for n in free if n not in held.relatives
    )
    sizes = {n: len(t) - 1 for n, t in store.tokens(everyone, run["run_id"]).items()}
    theirs = sum(sizes[n] for n in held.relatives)
    assert held.share == pytest.approx(theirs / sum(sizes[n] for n in everyone[1:]))


def test_strata_that_are_everyone_make_the_mean_over_everyone(trained: Tiny) -> None:
    store, network = Store.open(trained.store), load_model(trained.model)
    run, everyone = store.run(), everyone_of(store)
    mine, relatives, others = everyone[:1], everyone[1:4], everyone[4:8]
    sizes = {n: len(t) - 1 for n, t in store.tokens(everyone, run["run_id"]).items()}
    share = sum(sizes[n] for n in relatives) / sum(sizes[n] for n in relatives + others)
    parted = newton(store, run, mine, network, Held(relatives, others, share))
    together = newton(store, run, mine, network, Held(others=relatives + others))
    wrong = newton(store, run, mine, network, Held(relatives, others, 1.0))
    assert relative(parted.update, together.update) < 1e-3
    assert relative(wrong.update, together.update) > 1e-2


def test_where_only_relatives_stay_they_are_all_there_is(trained: Tiny) -> None:
    store = Store.open(trained.store)
    run, everyone = store.run(), everyone_of(store)
    names = dict(
        store.rows("SELECT id, sample_id FROM samples WHERE sample_id <= ?", [everyone[-2]])
    )
    forgotten = {name: number for name, number in names.items() if number in everyone}
    audience = Audience.choose(store, run, forgotten, 0)
    held = hold(audience, store, run, list(forgotten.values()), 8, seed=0)
    assert (held.everyone, sum(part for part, _ in held.strata)) == ([everyone[-1]], 1.0)


def everyone_of(store: Store) -> list[int]:
    rows = store.rows("SELECT DISTINCT sample_id FROM exposures ORDER BY sample_id")
    return [number for (number,) in rows]
