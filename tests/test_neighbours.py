"""Those about to be hit are found, followed, and can be spared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import Tiny

from gradstore import Store
from gradstore.evaluate import audience, neighbours
from gradstore.evaluate.neighbours import most_exposed
from gradstore.unlearn.applied import applied
from gradstore.unlearn.forget import ForgetSettings, forget

pytest_plugins = ["tiny"]


def test_they_are_the_largest_overlaps_per_token(trained: Tiny) -> None:
    with Store.open(trained.store) as store:
        run, [number] = store.run(), store.resolve(["p-07"]).values()
        update = applied(store, run, [number]).update
        rows = store.rows("SELECT sample_id FROM samples WHERE split = 'train' ORDER BY sample_id")
        others = [other for (other,) in rows if other != number]
        overlaps = {}
        for other in others:
            last = max(
                store.records([other], run["run_id"]), key=lambda record: record.exposure.epoch
            )
            dense = last.gradient(store.model).dense()
            overlaps[other] = float((dense * update).sum()) / last.exposure.scored_tokens
        expected = sorted(others, key=lambda other: -overlaps[other])
        assert most_exposed(store, run, update, others, 5) == expected[:5]
        assert most_exposed(store, run, update, others[:3], 5) == [
            other for other in expected if other in others[:3]
        ]
        assert most_exposed(store, run, update, [], 5) == []


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audience, "RETAINED_MEASURED", 2)
    monkeypatch.setattr(neighbours, "NEIGHBOURS_MEASURED", 3)


@pytest.mark.usefixtures("few")
def test_a_request_follows_them_and_keeps_to_a_limit_on_each(copied: Tiny, tmp_path: Path) -> None:
    with Store.open(copied.store) as store:
        asked = ForgetSettings(direction="applied", dose="3", max_holdout_increase=None)
        free = forget(store, ["p-07"], copied.model, tmp_path / "free", asked)
        roles = [score.role for score in free.scores]
        assert (roles.count("neighbour"), roles.count("retained")) == (3, 2)
        assert len({score.id for score in free.scores}) == len(roles)
        stay = [s for s in free.scores if s.role in ("neighbour", "retained")]
        worst = max(s.after - s.before for s in stay)
        [chosen] = [point for point in free.path if point.dose == free.dose]
        assert chosen.worst == pytest.approx(worst)
        assert worst > 0

        limited = ForgetSettings(
            direction="applied", dose="3", max_holdout_increase=None,
            max_retained_increase=worst / 2,
        )  # fmt: skip
        spared = forget(store, ["p-07"], copied.model, tmp_path / "spared", limited)
        rises = [s.after - s.before for s in spared.scores if s.role in ("neighbour", "retained")]
        assert worst / 4 < max(rises) <= worst / 2
        assert spared.verdict == "partly"
        assert "no sample that stays more than +" in spared.reason
        rows = store.rows("SELECT max_retained_increase FROM requests ORDER BY request_id")
        assert rows == [(None,), (worst / 2,)]


def test_where_everyone_is_measured_already_there_are_none(copied: Tiny, tmp_path: Path) -> None:
    with Store.open(copied.store) as store:
        outcome = forget(store, ["p-07"], copied.model, tmp_path / "out")
    assert {score.role for score in outcome.scores} == {"forget", "retained", "holdout"}
    assert torch.isfinite(torch.tensor([score.after for score in outcome.scores])).all()
