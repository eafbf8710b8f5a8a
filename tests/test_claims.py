"""The verdicts that benchmarks/paper_claims.py draws, and the bisection it draws them at."""

import json
import math
from pathlib import Path

import pytest

from gradstore.evaluate.statistics import Estimate


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


@pytest.mark.parametrize(
    ("low", "high", "side", "verdict"),
    [
        (0.2, 0.9, -1, "for"),
        (1.1, 3.0, -1, "against"),
        (1.1, 3.0, 1, "for"),
        (0.2, 0.9, 0, "for"),
        (0.9, 1.1, -1, "open"),
        (math.nan, math.nan, 1, "open"),
    ],
)
def test_a_figure_speaks_only_with_its_whole_interval(
    low: float, high: float, side: int, verdict: str
) -> None:
    from claims.verdicts import Finding

    assert Finding("", Estimate(1.0, low, high), 1.0, side).verdict == verdict


def test_a_sentence_says_what_its_figures_say() -> None:
    from claims.verdicts import Finding, sentence

    good = Finding("a ÷ b", Estimate(0.5, 0.4, 0.6), 1.0, -1)
    bad = Finding("a ÷ c", Estimate(2.0, 1.5, 3.0), 1.0, -1)
    unsure = Finding("a ÷ d", Estimate(1.0, 0.5, 2.0), 1.0, -1)
    assert sentence("It", [good]) == "It: holds (a ÷ b = 0.50 [0.40, 0.60])."
    assert sentence("It", [bad, unsure]).startswith("It: does not hold here (a ÷ c = 2.00")
    assert sentence("It", [good, bad]).startswith("It: holds when a ÷ b")
    assert "a ÷ c" in sentence("It", [good, bad])
    assert sentence("It", [good, unsure, unsure]).startswith("It: holds when")
    assert sentence("It", [unsure]).startswith("It: cannot be told here")
    assert "and 2 more; 0.50" not in sentence("It", [good] * 5)
    assert "and 2 more, 0.50 to 0.50" in sentence("It", [good] * 5)


def test_a_ratio_is_the_geometric_mean_over_records() -> None:
    from claims.verdicts import ratio

    found = ratio([(1.0, 2.0), (4.0, 2.0), (1.0, 1.0)])
    assert found.value == pytest.approx(1.0)
    assert found.low < 1 < found.high


def test_a_score_has_to_beat_the_random_one() -> None:
    from claims.findings import by_chance, by_rises, by_success
    from claims.results import Results

    scores = [
        {"text": "t", "kind": "raw", "method": method, "seed": 0, "id": str(n),
         "rho": rho + n / 1000, "own": float(n), "R_f": 1 / (n + 1) if method == "good" else 0.5}
        for n in range(9)
        for method, rho in (("random", 0.4), ("good", 0.8), ("idle", 0.4))
    ]  # fmt: skip
    results = Results([], scores, [], {})
    assert [found.verdict for found in by_rises(results)] == ["for", "open"]
    assert [found.verdict for found in by_success(results)] == ["for", "against"]
    assert by_chance(9) > by_chance(18) > 0.4


def test_bisection_finds_the_first_crossing_and_says_when_there_is_none() -> None:
    from claims.measure import dose_for

    assert dose_for(lambda dose: dose**2, 9.0, 0.01) == pytest.approx(3.0, rel=1e-3)
    assert dose_for(lambda dose: min(dose, 1.0), 2.0, 0.01) is None
    assert dose_for(lambda dose: 5 * math.sin(dose), 4.0, 0.1) == pytest.approx(
        math.asin(0.8), rel=1e-2
    )


def test_a_page_keeps_what_stands_outside_the_marks(tmp_path: Path) -> None:
    from claims.page import MARKS, put

    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    put(page, r"new \1")
    put(page, r"newer \1")
    assert page.read_text() == f"before\n{MARKS[0]}\nnewer \\1\n{MARKS[1]}\nafter\n"


def test_the_last_two_of_two_blocks_are_all() -> None:
    from claims.results import PAPER, Results

    def rows(count: int) -> list[dict[str, object]]:
        places = ["embedding", *(f"transformer.h.{n}.*" for n in range(count))]
        places.append(",".join(places[-2:]))
        return [PAPER | {"text": "t", "where": place} for place in places]

    assert Results(rows(4), [], [], {}).last_blocks("t") == ["transformer.h.2.*,transformer.h.3.*"]
    assert Results(rows(2), [], [], {}).last_blocks("t") == []


def test_doing_nothing_is_a_place_to_stop() -> None:
    from claims.results import OURS, PAPER, Results

    path = [[0.0, 1.0, 1.0], [0.5, 1.5, 1.5], [1.0, 2.0, 2.0]]  # dose, R_f, loss
    row = {"text": "t", "seed": 0, "id": "a", "before": 1.0, "reference": 2.0, "dose": 3.0}
    rows = [row | way | {"path": path, "estimate": 1.5} for way in (PAPER, OURS)]
    stops = Results(rows, [], [], {}).stops("t", PAPER)
    assert stops["least R_f"] == [(1.0, 0.0)]
    assert stops["estimated loss"] == [(1.5, 0.5)]
    assert stops["retrained loss"] == [(2.0, 1.0)]


def test_the_seconds_of_several_runs_add_up(tmp_path: Path) -> None:
    from paper_claims import timed

    file = tmp_path / "took.json"
    file.write_text('{"wall": 100.0, "processor": 50.0, "threads": 7, "torch": "x"}')
    with timed(file):
        sum(range(10**6))
    took = json.loads(file.read_text())
    assert 100 < took["wall"] < 160
    assert 50 < took["processor"] <= 50 + took["wall"] - 100 + 0.1
    assert (took["threads"], took["torch"]) == (7, "x")
