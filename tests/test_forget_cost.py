"""benchmarks/forget_cost.py, on a model of a few thousand parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import tiny
from rich.console import Console


def test_it_measures_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from forget_cost import Plan, Times, inner_of, measure, reckoned, table_of

    plan = Plan(
        layers=1, width=16, heads=2, vocabulary=60, length=12, count=6, batch=4, epochs=2, held=2,
        few=2, turns=1, records=101,
    )  # fmt: skip
    found = measure(plan, tmp_path, Console(quiet=True))
    seconds, again = found["processor_seconds"], found["retraining_processor_seconds"]
    assert seconds.keys() == found["seconds"].keys()
    assert all(value > 0 for value in seconds.values())
    assert again["this run"] == pytest.approx(2 * 2 * seconds["step"])  # two epochs of two steps
    assert again["records"] == pytest.approx(2 * 26 * seconds["step"])
    for of, ratios in found["ratios"].items():
        for name, ratio in ratios.items():
            assert ratio == pytest.approx(again[of] / seconds[name])
    for name, enough in found["records_for_the_bar"].items():
        assert enough / 4 * 2 * seconds["step"] >= 100 * seconds[name]
        assert (enough / 4 - 1) * 2 * seconds["step"] < 100 * seconds[name]
    assert table_of(found).row_count == 6
    assert reckoned(Times(1.0, 2.0), few=4) == Times(16 * 128 / 4, 2 * 16 * 128 / 4)
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    blocks = [f"transformer.h.{block}.{layer}" for block in (0, 1) for layer in layers]
    weights = [f"{layer}.{kind}" for layer in blocks for kind in ("weight", "bias")]
    assert inner_of(tiny()) == ["embedding", *weights]
