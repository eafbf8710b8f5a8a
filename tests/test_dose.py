"""A path's dose is the one its docstring promises."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstore.unlearn.dose import (
    AROUND,
    Dose,
    Limits,
    Point,
    follow_multiple,
    follow_target,
)

POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


@given(POSITIVE)
def test_a_dose_is_a_number_or_a_target(value: float) -> None:
    assert Dose.parse(repr(value)) == Dose(repr(value), multiple=value)
    assert Dose.parse(f"target:{value!r}") == Dose(f"target:{value!r}", target=value)
    assert Dose.parse("target") == Dose("target")


@given(st.one_of(st.text(), st.floats(max_value=0).map(str), st.sampled_from(["nan", "inf"])))
def test_no_other_text_is_a_dose(text: str) -> None:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if 0 < number < math.inf or text == "target":
        return
    for form in (text, f"target:{text}"):
        with pytest.raises(ValueError, match="is no dose; expected a positive number, target, or"):
            Dose.parse(form)


def measure(
    forget: Callable[[float], float], holdout: Callable[[float], float] | None = None
) -> Callable[[float], Point]:
    return lambda dose: Point(dose, forget(dose), None, holdout(dose) if holdout else None)


def rising(dose: float) -> float:
    return 1 + dose


@given(multiple=st.floats(0.01, 100), rate=st.floats(0.01, 10), limit=st.floats(0, 10))
def test_an_asked_dose_is_given_as_far_as_the_limit_allows(
    multiple: float, rate: float, limit: float
) -> None:
    path = follow_multiple(measure(rising, lambda dose: 2 + rate * dose), multiple, Limits(limit))
    doses = [point.dose for point in path.points]
    assert doses == sorted(set(doses))
    assert {0.0, *(multiple * x for x in AROUND)} <= set(doses)
    assert path.chosen in path.points
    assert path.chosen.holdout is not None
    assert path.chosen.holdout - 2 <= limit
    assert path.reached == (2 + rate * multiple - 2 <= limit)
    if path.reached:
        assert path.chosen.dose == multiple
    else:  # the largest that is allowed, to a 64th of a quarter of what was asked for
        assert path.chosen.dose <= multiple
        assert limit / rate - path.chosen.dose <= multiple / 4 / 64 * (1 + 1e-6) + 1e-12


def test_an_asked_dose_without_held_out_samples_or_limit_is_given() -> None:
    for path in (
        follow_multiple(measure(rising), 4, Limits(0.1)),
        follow_multiple(measure(rising, rising), 4, Limits()),
    ):
        assert (path.chosen.dose, path.reached, len(path.points)) == (4, True, 1 + len(AROUND))


def test_damage_that_comes_and_goes_does_not_matter_below_the_asked_dose() -> None:
    bump = measure(rising, lambda dose: 5.0 if 2 < dose < 7 else 0.0)
    assert follow_multiple(bump, 8, Limits(0.1)).chosen.dose == 8
    path = follow_multiple(bump, 6, Limits(0.1))
    assert not path.reached
    assert 2 - 1.5 / 64 <= path.chosen.dose <= 2


def test_a_dose_at_which_the_model_breaks_is_never_chosen() -> None:
    broken = measure(lambda dose: 1 + dose if dose < 3 else math.nan)
    path = follow_multiple(broken, 4, Limits())
    assert not path.reached
    assert 3 - 1 / 64 <= path.chosen.dose < 3
    path = follow_target(broken, 5, 0.5, Limits())
    assert not path.reached
    assert 3 - 2 / 64 <= path.chosen.dose < 3


@given(target=st.floats(1.01, 1000), first=st.floats(0.001, 1))
def test_a_target_is_closed_in_on(target: float, first: float) -> None:
    path = follow_target(measure(rising), target, first, Limits())
    assert path.reached
    assert abs(path.chosen.dose - (target - 1)) <= max(first, target - 1) / 64
    assert [point.dose for point in path.points] == sorted({point.dose for point in path.points})


def test_the_first_crossing_counts() -> None:
    hill = measure(lambda dose: 1 + 2 * math.exp(-((dose - 2) ** 2)) + (10 if dose > 9 else 0))
    path = follow_target(hill, 2.5, 0.25, Limits())
    assert path.reached
    assert path.chosen.dose == pytest.approx(2 - math.sqrt(math.log(2 / 1.5)), abs=1 / 64)
    assert max(point.dose for point in path.points) == 2


def test_a_target_beyond_the_limit_is_approached_to_the_limit() -> None:
    path = follow_target(measure(rising, lambda dose: 2 * dose), 9, 0.25, Limits(1.0))
    assert not path.reached
    assert 0.5 - 0.25 / 64 <= path.chosen.dose <= 0.5


def test_a_target_that_is_met_already_or_cannot_be() -> None:
    met = follow_target(measure(rising), 0.5, 0.25, Limits(1.0))
    assert (met.reached, met.chosen.dose, len(met.points)) == (True, 0, 1)
    flat = follow_target(measure(lambda dose: 1 + dose / (1 + dose)), 2.5, 0.25, Limits())
    assert not flat.reached
    assert flat.chosen.dose == flat.points[-1].dose > 1e6
