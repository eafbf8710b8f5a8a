"""The verdicts that benchmarks/paper_claims.py draws, and the bisection it draws them at."""

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
