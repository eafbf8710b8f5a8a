"""``gradstore erase``: what it takes out, what it refuses, what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from erased import contents, row_of, state
from records import assert_all_equal
from tiny import FAR, Tiny, digests, files, refused, run, run_json

from gradstore import Store
from gradstore.errors import IdError
from gradstore.evaluate.audience import Audience
from gradstore.evaluate.figures import Measured, figures
from gradstore.evaluate.record import record
from gradstore.influence.query import of_sample
from gradstore.influence.questions import record_scores
from gradstore.influence.top import Settings, influences
from gradstore.store import catalog
from gradstore.unlearn.match import Match, Thresholds, record_matches

pytest_plugins = ["tiny"]


@pytest.fixture
def used(copied: Tiny, tmp_path: Path) -> Tiny:
    """A store in which much is known of p-07."""
    out = tmp_path / "without p-07"
    run(
        "forget", "p-07", *FAR, "-s", copied.store, "--model", copied.model, "--out", out, code=None
    )
    run("match", "p-07", "-s", copied.store, "--jaccard", 0.01)
    run("top", "--id", "p-07", "-s", copied.store)
    run("sketch", "-s", copied.store)
    (copied.store / "unfinished").mkdir()
    (copied.store / "unfinished" / "rounds-0.safetensors").write_bytes(b"p-07")
    return copied


def test_the_command_erases_all_that_is_known_of_a_record(used: Tiny, tmp_path: Path) -> None:
    before = digests(used.store)
    plan = run("erase", "p-07", "-s", used.store, "--dry-run")
    assert "rows of matches" in plan.stdout
    assert digests(used.store) == before, "a dry run changes nothing"
    unasked = run("erase", "p-07", "-s", used.store, stdin="y\n", code=2)
    assert "nobody is there to ask: give --yes" in unasked.stderr
    assert digests(used.store) == before, "neither does one that nobody confirmed"

    store = Store.open(used.store)
    kept, [number] = state(store, "p-07", "h-03"), store.resolve(["p-07"]).values()
    text = store.tokens([number], 1)[number]
    marks = []
    for stored in store.records([number], 1):
        assert stored.output is not None
        marks += [row_of(stored.D), row_of(stored.output.H, -1)]
    wide = text.int().numpy().tobytes()  # only held-out samples' tokens lie so
    marks += [wide, text.to(torch.uint16).numpy().tobytes()]
    marks += [b"p-07", catalog.hash_of("p-07").to_bytes(8, "little")]
    held = contents(used.store)
    assert all(any(mark in data for data in held.values()) for mark in marks if mark is not wide)
    shown = run_json("erase", "p-07", "h-03", "-s", used.store, "--yes")
    assert shown["hits"] == []
    assert shown["searched"][0]["patterns"] == len(set(marks)) + 3 + 3 + 2
    held = contents(used.store)
    for mark in marks:
        assert [place for place, data in held.items() if mark in data] == []
    assert sorted(p.name for p in (used.store / "receipts").iterdir()) == ["0001.json"]
    assert not (used.store / "unfinished").exists()
    assert len(list((used.store / "published").glob("*.duckdb"))) <= 2
    after = state(store)
    assert_all_equal(after.pop("records"), kept.pop("records"))
    assert after == kept
    assert run("audit", "-s", used.store).stderr.startswith("the chain of 4 holds")
    assert "the store is sound" in run("verify", "-s", used.store).stderr
    again = run("erase", "p-07", "-s", used.store, "--yes")
    assert "p-07 erased: nothing was found" in again.stderr
    for command in (("show", "p-07"), ("erase", "p-07", "p-77"), ("top", "--id", "p-07")):
        said = refused(*command, "-s", used.store)
        assert f"no sample has the id {command[-1]!r}" in said
        assert ("p-07' (it was erased on 20" in said) == (command[-1] == "p-07")


def test_ingest_refuses_what_was_erased(copied: Tiny, tmp_path: Path) -> None:
    run("erase", "p-07", "-s", copied.store, "--yes")
    again = ("ingest", copied.data, "-s", copied.store, "--model", copied.model, "--epochs", 1)
    said = refused(*again, "--out", tmp_path / "refused")
    assert said.startswith("'p-07' was erased from this store")
    assert not (tmp_path / "refused").exists()
    before = digests(copied.store)
    run(*again, "--out", tmp_path / "planned", "--allow-erased", "--dry-run")
    wrong = ("--layers", "nothing.like.it", "--allow-erased")
    assert "nothing.like.it" in refused(*again, "--out", tmp_path / "wrong", *wrong)
    assert digests(copied.store) == before, "what fails and a dry run allow nothing"
    run(*again, "--out", tmp_path / "allowed", "--allow-erased")
    listed = run_json("audit", "-s", copied.store)
    assert [entry["kind"] for entry in listed] == ["erase", "search", "override"]
    assert [row["id"] for row in run_json("list", "p-07", "-s", copied.store)] == ["p-07"]


def test_exact_replay_says_that_a_record_is_missing(copied: Tiny, tmp_path: Path) -> None:
    run("erase", "p-07", "-s", copied.store, "--yes")
    exact = ("forget", "p-02", "-s", copied.store, "--model", copied.model, "--exact")
    assert "23 of the 24 records" in refused(*exact, "--out", tmp_path / "exact")


def test_what_is_found_is_exit_code_3(copied: Tiny) -> None:
    (copied.store / "notes.json").write_text(json.dumps({"who": "p-07"}))
    shown = run_json("erase", "p-07", "-s", copied.store, "--yes", code=3)
    assert shown["hits"] == [{"found": "id: notes.json"}]


def test_text_is_searched_for_too(copied: Tiny) -> None:
    """As it is, as JSON has it, and in the catalog's columns."""
    rows = [json.loads(line) for line in copied.data.read_text().splitlines()]
    text = {row["id"]: row["text"] for row in rows}
    (copied.store / "plain.txt").write_text(f"once: {text['p-07']} and so on")
    (copied.store / "escaped.json").write_text(json.dumps([text["p-07"]]))
    with Store.open(copied.store).transaction() as connection:
        connection.execute("UPDATE runs SET name = ?", [f"the run of {text['p-07']}"])
    shown = run_json("erase", "p-07", "-s", copied.store, "--yes", code=3)
    found = {hit["found"] for hit in shown["hits"] if "duckdb" not in hit["found"]}
    assert found >= {"text: plain.txt", "text: escaped.json", "text: catalog, runs.name"}
    assert all(hit.startswith("text: ") for hit in found)


def test_without_a_tokenizer_it_says_so(copied: Tiny, tmp_path: Path) -> None:
    with Store.open(copied.store).transaction() as connection:
        connection.execute("UPDATE runs SET checkpoint = 'nowhere'")
    done = run("erase", "p-07", "-s", copied.store, "--yes")
    assert "note: not searched for text: no checkpoint is left" in done.stderr
    assert "holds no tokenizer" in refused(
        "erase", "p-08", "-s", copied.store, "--yes", "--model", tmp_path
    )
    done = run("erase", "p-08", "-s", copied.store, "--yes", "--model", copied.model)
    assert "not searched for text" not in done.stderr


def test_an_unknown_id_is_an_error(tmp_path: Path, copied: Tiny) -> None:
    assert "no sample" in refused("erase", "q-1", "-s", copied.store, "--yes")
    tiny = files(tmp_path / "empty")
    run("init", tiny.store)
    assert "holds nothing yet" in refused("erase", "q-1", "-s", tiny.store, "--yes")


def test_scores_reckoned_before_an_erasure_are_not_kept_after_it(copied: Tiny) -> None:
    store = Store.open(copied.store)
    about, other = (of_sample(store, store.run(), id) for id in ("p-07", "p-08"))
    found = influences(store, [about, other], Settings())
    found[0] = found[0].without([store.resolve(["p-07"])["p-07"]])  # only the question names it
    match = Match("p-08", "p-07", 0.9, 0.9, 0.9, ("jaccard",))
    numbers = store.resolve(["p-07"])
    audience = Audience([("p-07", "forget")], numbers, [torch.arange(4)])
    measured = Measured(audience, {"model": {"loss": np.array([1.0])}}, {})
    facts = {"run_id": 1, "model": "forgotten", "model_digest": "0"}
    run("erase", "p-07", "-s", copied.store, "--yes")
    store.refresh()
    for scores in found:
        with pytest.raises(IdError, match="erased meanwhile"):
            record_scores(store, scores, [])
    with pytest.raises(IdError, match="no sample has the id 'p-07'"):
        record_matches(store, [match], Thresholds())
    with pytest.raises(IdError, match="erased meanwhile"):
        record(store, facts, measured, figures(measured))
    for table in ("influence_runs", "influences", "matches", "evaluations", "measurements"):
        assert store.rows(f"FROM {table}") == []
