"""What benchmarks hold forgetting against: a second retraining, beside what was done."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny


def test_another_retraining_is_judged_as_an_unlearned_model_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from retraining.judges import Judges, another

    texts = [torch.arange(start, start + 8) for start in range(6)]
    original, reference, other = (tiny(seed=seed) for seed in range(3))
    mine = Judges(reference, original, texts[:2], texts[2:4], texts[4:], None)

    same = another(mine, reference)
    assert same["R_f"] == pytest.approx(0, abs=1e-6)
    assert same["after"] == pytest.approx(same["reference"])

    undone = another(mine, original)
    assert undone["R_f"] == pytest.approx(1)
    assert undone["Δ"] == pytest.approx(0)
    assert another(mine, other)["R_f"] > 0.01


def test_a_path_beats_what_is_further_off_or_harms_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from retraining.judges import Judges, along, beaten, compare

    texts = [torch.arange(start, start + 8) for start in range(6)]
    original, reference = tiny(seed=0), tiny(seed=1)
    judges = Judges(reference, original, texts[:2], texts[2:4], texts[4:], None)
    walked = along(reference, 2.0, judges)  # straight to the retrained model
    [end] = [point for point in walked["path"] if point[0] == 2.0]
    after = judges.after(reference)
    assert end == pytest.approx((2.0, 0.0, after["Δ"]), abs=1e-5)
    assert (walked["best_dose"], walked["best_R_f"]) == (2.0, end[1])

    path = [(0.5, 0.8, 0.001), (1.0, 0.4, 0.02)]
    assert beaten({"R_f": 0.9, "Δ": 0.001}, path)
    assert beaten({"R_f": 0.4, "Δ": 0.03}, path)
    assert not beaten({"R_f": 0.9, "Δ": 0.0}, path)  # harms less than any point
    assert not beaten({"R_f": 0.3, "Δ": 1.0}, path)  # is nearer than any

    rows: list[dict[str, Any]] = [
        {"direction": "raw", "R_f": 0.9, "Δ": 0.1},
        {"direction": "newton", "R_f": 0.4, "Δ": 0.02, "path": path},
        {"direction": "npo", "R_f": 0.3, "Δ": 0.1},
        {"direction": "fresh", "verdict": "refused"},
    ]
    compare(rows)
    assert [row.get("beaten") for row in rows] == [True, None, False, None]
    compare(without := [{"direction": "raw", "R_f": 0.9, "Δ": 0.1}])
    assert "beaten" not in without[0]


def test_a_summary_says_how_often_a_method_is_beaten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from retraining.tables import summary_of, table_of_summary

    row = {"records": 1, "direction": "raw", "R_f": 0.9, "Δ": 0.1, "KL_h": 2.0, "KL_h_floor": 1.0}
    row |= {"before": 1.0, "after": 1.5, "reference": 2.0, "held_out_estimate": 2.1}
    [raw] = summary_of([row | {"beaten": True}, row | {"beaten": False}])
    assert (raw["beaten"], raw["membership"]) == (0.5, None)
    shown = [str(column.header) for column in table_of_summary([raw]).columns]
    assert "beaten" in shown
    assert "membership" not in shown  # not measured
