"""What benchmarks hold forgetting against: a second retraining, beside what was done."""

from pathlib import Path

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
