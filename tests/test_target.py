"""What is estimated of a record that was never trained on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import Tiny

from gradstore import Store
from gradstore.unlearn.forget import ForgetSettings, forget
from gradstore.unlearn.target import Target, from_held_out, from_undoing

pytest_plugins = ["tiny"]


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(-5, 5)), min_size=1, max_size=9))
def test_undoing_goes_a_part_of_the_way(pairs: list[tuple[float, float]]) -> None:
    before = [loss for loss, _ in pairs]
    target = from_undoing(before, [loss + rise for loss, rise in pairs])
    mean = sum(before) / len(pairs)
    rise = sum(rise for _, rise in pairs) / len(pairs)
    assert target.loss == pytest.approx(mean + rise * 1.4, abs=1e-9)
    assert sum(target.each) / len(pairs) == pytest.approx(target.loss, abs=1e-9)
    assert target.low <= target.loss <= target.high
    for (low, high), own, (loss, up) in zip(target.ranges, target.each, pairs, strict=True):
        assert low <= own <= high
        assert (high if up > 0 else low) == pytest.approx(loss + up * 1.9, abs=1e-9)
    assert (target.high if rise > 0 else target.low) == pytest.approx(mean + rise * 1.9, abs=1e-9)


def test_what_was_asked_for_is_known_from_below() -> None:
    target = Target.asked(2.0)
    assert (target.low, target.loss, target.source) == (2.0, 2.0, "asked")
    assert target.high > 1e9


@pytest.mark.parametrize(("times", "dose"), [(0.3, None), (0.0, 1 / 64), (-1.0, 1.0), (2.0, 1.0)])
def test_a_default_dose_stays_in_the_range(
    times: float, dose: float | None, trained: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def narrow(before: list[float], undone: list[float], _: object) -> Target:
        high = before[0] + times * (undone[0] - before[0]) + 1e-6 * (times == 0)
        return Target(high - 0.1, high - 0.2, high, "undo", (high - 0.1,), ((high - 0.2, high),))

    monkeypatch.setattr("gradstore.unlearn.forget.from_undoing", narrow)
    store, out = Store.open(trained.store), Path("nowhere")
    ask = partial(forget, store, ["p-07"], trained.model, out, dry_run=True)
    outcome = ask(ForgetSettings(direction="applied"))
    assert outcome.target is not None
    assert outcome.dose is not None
    assert any("would raise the loss past" in note for note in outcome.notes) == (dose != 1.0)
    losses = {point.dose: point.forget for point in outcome.path}
    if dose is None:
        assert losses[outcome.dose] < outcome.target.high < losses[outcome.dose * 1.25]
    else:
        assert outcome.dose == pytest.approx(dose)
    assert ask(ForgetSettings(direction="applied", dose="1")).dose == 1.0  # as it was asked for


@given(
    st.lists(st.floats(0, 10), min_size=2, max_size=9),
    st.lists(st.floats(0, 10), min_size=1, max_size=5),
    st.floats(0.1, 5),
    st.floats(-5, 5),
)
def test_the_held_out_estimate_carries_one_distribution_onto_the_other(
    members: list[float], asked: list[float], ratio: float, shift: float
) -> None:
    if max(members) - min(members) < 1e-3:
        members = [1.0, 2.0]
    held_out = [shift + ratio * loss for loss in members]
    expected = sum(shift + ratio * loss for loss in asked) / len(asked)
    target = from_held_out(asked, members, held_out)
    assert target.loss == pytest.approx(expected, abs=1e-6)
    assert sum(target.each) / len(asked) == pytest.approx(expected, abs=1e-6)
    before = sum(asked) / len(asked)
    way = max(0, target.loss - before)
    assert target.low == pytest.approx(before + way / 3)
    assert target.high == pytest.approx(before + 1.5 * way)
    for (low, high), own, loss in zip(target.ranges, target.each, asked, strict=True):
        rise = max(0, own - loss)
        assert (low, high) == pytest.approx((loss + rise / 3, loss + 1.5 * rise))
    shifted = from_held_out(asked, [2.0, 2.0], [1.0, 4.0]).loss  # no spread: only the mean moves
    assert shifted == pytest.approx(sum(asked) / len(asked) + 0.5, abs=1e-9)
