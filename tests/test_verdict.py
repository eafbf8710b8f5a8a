"""A verdict follows the range that a loss should have come to; each sample has its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import Tiny, run, run_json

from gradstore.unlearn.dose import Dose, Limits, Point
from gradstore.unlearn.dose import Path as Walked
from gradstore.unlearn.request import Score
from gradstore.unlearn.target import Target, from_held_out, from_undoing
from gradstore.unlearn.verdict import falls_short, judged, reason_of, verdict_of

pytest_plugins = ["tiny"]
BEFORE, LOW = 1.0, 3.0


def walked(after: float, retained: float = 0.0, reached: bool = True) -> Walked:
    points = [Point(0.0, BEFORE, 1.0, 2.0), Point(1.0, after, 1.0 + retained, 2.0)]
    return Walked(points, points[1], reached)


def undone() -> Target:
    target = from_undoing([BEFORE], [LOW])
    assert target.low == LOW
    return target


@given(st.floats(0, 5), st.floats(-2, 6), st.floats(-1, 4))
def test_only_a_range_from_undoing_has_a_margin(before: float, after: float, way: float) -> None:
    low = before + way
    assert falls_short(before, after, low, "held-out") == (after < low)
    short = falls_short(before, after, low, "undo")
    assert short == (after < before + 0.75 * (low - before))
    assert not falls_short(before, low, low, "undo") or way < 0


@pytest.mark.parametrize(
    ("after", "reached", "verdict"),
    [(3.0, True, "forgotten"), (2.6, True, "forgotten"), (2.4, True, "partly"),
     (3.0, False, "partly"), (9.0, True, "forgotten")],
)  # fmt: skip
def test_the_estimate_judges_the_default_dose_too(
    after: float, reached: bool, verdict: str
) -> None:
    assert verdict_of(walked(after, reached=reached), undone()) == verdict
    asked = "forgotten" if reached else "partly"
    assert verdict_of(walked(after, reached=reached), Target.asked(3.0)) == asked
    assert verdict_of(walked(after, reached=reached), None) == asked


def test_without_a_dose_there_is_nothing_to_judge() -> None:
    start = Point(0.0, BEFORE, None, None)
    assert verdict_of(Walked([start], start, False), undone()) == "refused"


def said(path: Walked, target: Target | None, samples: int = 1) -> str:
    scores = [Score(f"s-{at}", "forget", BEFORE, path.chosen.forget) for at in range(samples)]
    verdict = verdict_of(path, target)
    found = judged(scores, target, verdict)
    return reason_of(verdict, path, target, Limits(0.1), Dose.parse("1"), found)


def test_reasons_name_the_range_and_what_it_cost() -> None:
    known = "(never trained on, it would be about 3.80, 3.00 to 4.80)"
    assert said(walked(3.1), undone()) == (
        f"loss 1.000 to 3.100 nats per token {known}, retained +0.0000, held-out +0.0000"
    )
    assert said(walked(2.6), undone()).endswith("; 0.40 below that range, within its margin")
    short = said(walked(2.4), undone())
    assert known in short
    assert short.endswith("; below that range: raise --dose, or give --dose target")
    stopped = said(walked(2.4, reached=False), undone())
    assert stopped.endswith("; stopped at the limits: held-out loss +0.1; below that range")
    assert "retained +0.0200 (it should be no more than +0.01)" in said(walked(3.1, 0.02), undone())
    assert "it should be" not in said(walked(3.1, 0.02), None, samples=2)
    many = said(walked(3.1, 0.16), None, samples=2)
    assert "retained +0.1600 (it should be no more than +0.1), held-out" in many


def test_each_sample_has_its_own_outcome() -> None:
    scores = [Score("r", "retained", 1.0, 1.1), Score("a", "forget", 1.0, 2.9),
              Score("b", "forget", 1.0, 1.6), Score("c", "forget", 2.0, 2.1)]  # fmt: skip
    target = from_undoing([1.0, 1.0, 2.0], [3.0, 2.0, 2.1])
    found = judged(scores, target, "forgotten")
    assert [score.outcome for score in found] == [None, "forgotten", "partly", "forgotten"]
    assert [score.target for score in found] == [None, *map(pytest.approx, (3.8, 2.4, 2.14))]
    assert [score.way for score in found[1:]] == pytest.approx([1.9 / 2.8, 0.6 / 1.4, 1 / 1.4])
    assert (found[1].low, found[1].high) == pytest.approx((3.0, 4.8))
    mean = Point(1.0, 2.2, None, None)
    path = Walked([Point(0.0, 4 / 3, None, None), mean], mean, True)
    assert "; 1 of 3 samples below their own range" in reason_of(
        "forgotten", path, target, Limits(), Dose.parse("1"), found
    )
    refused = judged(scores, target, "refused")
    assert {score.outcome for score in refused[1:]} == {"refused"}
    asked = judged(scores, Target.asked(2.0), "partly")
    assert {score.outcome for score in asked[1:]} == {"partly"}
    assert {score.low for score in asked} == {None}
    told = judged(scores[1:], from_held_out([1.0, 1.0, 2.0], [1.0, 2.0], [4.0, 5.0]), "forgotten")
    assert [score.outcome for score in told] == ["forgotten", "partly", "partly"]


def test_the_command_says_of_each_what_came_of_it(copied: Tiny, tmp_path: Path) -> None:
    def request(out: str, *arguments: object, code: int | None = 0) -> list[object]:
        return ["forget", "p-07", "p-11", "-s", copied.store, "--model", copied.model, "--out",
                tmp_path / out, "--max-holdout-increase", 9, *arguments]  # fmt: skip

    applied = ("--direction", "applied")
    near = run_json(*request("near", *applied, "--dose", 0.9))
    assert near["request"][0]["verdict"] == "forgotten"
    short = run_json(*request("short", *applied, "--dose", 0.2), code=3)
    for found, outcome in ((near, "forgotten"), (short, "partly")):
        for each in found["forgotten"]:
            assert each["loss_after"] < each["low"] < each["target"] < each["high"]
            gone = each["loss_after"] - each["loss_before"]
            assert each["way"] == pytest.approx(gone / (each["target"] - each["loss_before"]))
            assert each["outcome"] == outcome
    told = run(*request("again", *applied, "--dose", 0.2), code=3).stderr
    assert "; below that range: raise --dose, or give --dose target" in told
