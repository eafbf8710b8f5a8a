"""What is estimated of a record that was never trained on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstore.unlearn.target import Target, from_held_out, from_undoing


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
