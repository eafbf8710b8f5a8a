"""What benchmarks hold forgetting against: how much two trainings differ by themselves."""

from pathlib import Path

import pytest


def test_trainings_that_agree_pass_for_each_other_and_others_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from retraining.judges import between_trainings

    losses = [1.0 + number / 50 for number in range(100)]
    assert between_trainings([losses]) is None
    assert between_trainings([losses, losses]) == 1.0
    turned = between_trainings([losses, losses[::-1]])
    assert turned is not None
    assert turned < 0.5
