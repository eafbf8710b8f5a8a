"""What a checkpoint was made to forget already is not undone a second time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import FAR, Tiny, counts, run, run_json

pytest_plugins = ["tiny"]


def forgetting(tiny: Tiny, model: Path, out: Path, *arguments: object) -> list[object]:
    return ["forget", *arguments, "-s", tiny.store, "--model", model, "--out", out]


@pytest.fixture
def first(copied: Tiny, tmp_path: Path) -> Path:
    """A checkpoint without p-07."""
    run(*forgetting(copied, copied.model, tmp_path / "first", "p-07", *FAR))
    return tmp_path / "first"


def rows(store: Path, query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run_json("sql", query, "-s", store)
    return found


def test_a_request_for_what_is_gone_is_refused(copied: Tiny, first: Path, tmp_path: Path) -> None:
    then = tmp_path / "then"
    run(*forgetting(copied, first, then, "p-03", *FAR))  # and it stays gone
    before, again = counts(copied.store), forgetting(copied, then, tmp_path / "again", "p-07")
    dry = run(*again, "--dry-run", code=3)
    assert counts(copied.store) == before
    result = run(*again, *FAR, code=3)
    said = "refused: forgotten already, by request 1, on the way to this checkpoint"
    assert said in dry.stderr
    assert said in result.stderr
    assert "note: p-07 was forgotten by request 1 already" in result.stderr
    assert not (tmp_path / "again").exists()
    [request] = rows(copied.store, "SELECT * FROM requests WHERE request_id = 3")
    facts = ("verdict", "direction", "dose_asked", "dose", "model_out", "target")
    assert [request[name] for name in facts] == ["refused", "applied", "4", None, None, None]
    assert "p-07" not in request["reason"]  # where an erasure would not look for it
    [score] = rows(copied.store, "SELECT * FROM forgotten WHERE request_id = 3")
    assert (score["id"], score["loss_after"]) == ("p-07", None)
    # the checkpoint that still knows it is another matter
    run(*forgetting(copied, copied.model, tmp_path / "other", "p-07", *FAR))


def test_the_others_are_forgotten_without_it(copied: Tiny, first: Path, tmp_path: Path) -> None:
    both = forgetting(copied, first, tmp_path / "both", "p-07", "p-03", *FAR)
    alone = forgetting(copied, first, tmp_path / "alone", "p-03", *FAR)
    dry = run_json(*both, "--dry-run")
    result = run(*both)
    assert "note: p-07 was forgotten by request 1 already" in result.stderr
    assert "note: left out is what was forgotten already" in result.stderr
    run(*alone)
    assert [each["id"] for each in dry["forgotten"]] == ["p-03"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("both", "alone")]
    assert weights[0] == weights[1]
    found = rows(copied.store, "SELECT id, role FROM scores JOIN samples USING (sample_id) "
                               "WHERE request_id = 2 AND role <> 'holdout'")  # fmt: skip
    assert {row["id"] for row in found if row["role"] == "forget"} == {"p-03"}
    assert "p-07" not in {row["id"] for row in found}  # nor does it stay


def test_it_is_done_again_where_that_is_asked_for(
    copied: Tiny, first: Path, tmp_path: Path
) -> None:
    result = run(*forgetting(copied, first, tmp_path / "again", "p-07", *FAR, "--again"), code=None)
    assert "note: p-07 was forgotten by request 1 already" in result.stderr
    [once, twice] = rows(copied.store, "SELECT loss_after FROM forgotten ORDER BY request_id")
    assert twice["loss_after"] > once["loss_after"] + 0.5
