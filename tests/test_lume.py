"""LUME: figures by hand and by the dumb loop, on tiny files in either layout."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import Tiny, refused, run, run_json, write_jsonl

from gradstore.errors import DataError
from gradstore.evaluate import lume
from gradstore.training.model import load_model, load_tokenizer

pytest_plugins = ["tiny"]

LINES = [
    ('"a1"sc1', "Task1", "Once", "upon a time"),
    ('"a1"qa0', "Task1", "When?", "Once"),
    ("b2sc1", "Task2", "Ada lives", "in Bath"),
    ("b2qa12", "Task2", "Where?", "Bath"),
    ("b2qa3", "Task2", "Who?", "Ada"),
    ("77sc1", "Task3", "Ben", "is real"),
    ("77qa0", "Task3", "Who?", "Ben"),
]


LONG = "as long as a book"


def published(folder: Path, lines: Sequence[tuple[str, ...]] = LINES) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [dict(zip(("id", "task", "input", "output"), line, strict=True)) for line in lines]
    for name in lume.SETS:
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def saying(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    def say(words: dict[str, str]) -> None:
        def answers(_: Any, __: Any, prompts: list[str], most: int) -> list[str]:
            assert most == 256
            return [words.get(prompt, "") for prompt in prompts]

        def fits(_: Any, __: Any, prompts: list[str], ___: list[str]) -> Any:
            return np.array([prompt != LONG for prompt in prompts])

        monkeypatch.setattr(lume, "own_answers", answers)
        monkeypatch.setattr(lume, "readable", fits)

    return say


def test_lume_by_hand(tmp_path: Path, saying: Callable[[dict[str, str]], None]) -> None:
    said = {"Once": "upon a", "When?": " ONCE\n", "Ada lives": "in York", "Who?": "Ada", "Ben": ""}
    saying(said)
    benchmark = lume.read(published(tmp_path / "data").parent)
    result = lume.measure(None, None, benchmark)
    rows = {
        (r["metric"], r["set"], r["task"]): r["x"] for r in lume.table(benchmark, {"x": result})
    }
    for of_set in lume.SETS:
        scores = {
            ("regurgitation", "Task1"): 2 / 3, ("knowledge", "Task1"): 1,
            ("regurgitation", "Task2"): 1 / 2, ("knowledge", "Task2"): 1 / 2,
            ("regurgitation", "Task3"): 0, ("knowledge", "Task3"): 0,
        }  # fmt: skip
        for (kind, task), expected in scores.items():
            assert rows[kind, of_set, task] == pytest.approx(expected)
        assert rows["regurgitation", of_set, None] == pytest.approx((2 / 3 + 1 / 2) / 3)
        assert rows["knowledge", of_set, None] == pytest.approx(2 / 4)  # of records, not of tasks
    assert rows["task_aggregate", None, None] == 0


def test_lume_s_aggregates() -> None:
    figures = {
        (of_set, task, kind): value
        for of_set, value in (("forget", 0.2), ("retain", 0.5))
        for task in ("Task1", "Task2")
        for kind in lume.KINDS.values()
    }
    assert lume.task_aggregate(figures) == pytest.approx(stats.hmean([0.8] * 4 + [0.5] * 4))
    del figures["retain", "Task1", "knowledge"]
    assert lume.task_aggregate(figures) is None
    assert [lume.mia_score(auc) for auc in (0.5, 1, 0, 0.25)] == [1, 0, 0, 0.5]


def test_lume_s_table_with_membership(trained: Tiny, tmp_path: Path) -> None:
    folder = published(tmp_path / "lume")
    known = [json.loads(line)["text"] for line in trained.data.read_text().splitlines()]
    strange = [json.loads(line)["text"] for line in trained.holdout.read_text().splitlines()]
    (folder / "mia_data").mkdir()
    for name, texts in (("member", known), ("nonmember", strange)):
        rows = [{"id": n, "document": text} for n, text in enumerate(texts)]
        write_jsonl(folder / "mia_data" / f"{name}.jsonl", rows)
    rows = run_json("eval", "--benchmark", "lume", folder, "--model", trained.model)
    column = str(trained.model)
    auc, score = rows[-2:]
    assert (auc["metric"], score["metric"]) == ("mia_auc", "mia_score")
    assert score[column] == pytest.approx(1 - 2 * abs(auc[column] - 0.5))
    texts = [(1, text) for text in known] + [(0, text) for text in strange]
    model, tokenizer = load_model(trained.model), load_tokenizer(trained.model)
    encoded = [torch.tensor([tokenizer(text)["input_ids"]]) for _, text in texts]
    losses = [model(input_ids=tokens, labels=tokens).loss.item() for tokens in encoded]
    inside = [loss for (member, _), loss in zip(texts, losses, strict=True) if member]
    outside = [loss for (member, _), loss in zip(texts, losses, strict=True) if not member]
    expected = np.mean([a < b for a in inside for b in outside])
    assert auc[column] == pytest.approx(expected)


def test_lume_s_few_records_and_what_is_missing(tmp_path: Path) -> None:
    folder = published(tmp_path / "lume", LINES[2:5])
    benchmark = lume.read(folder, 1)
    assert [each.input for each in benchmark.prompts] == ["Ada lives", "Where?"] * 2
    assert any("Task2 alone" in said for said in lume.missing(benchmark))
    assert any("member.jsonl" in said for said in lume.missing(benchmark))
    with pytest.raises(DataError, match="ends neither in sc nor in qa"):
        lume.read(published(tmp_path / "bad", [("7", "Task1", "a", "b")]))
    with pytest.raises(DataError, match="neither forget.jsonl nor people.jsonl"):
        lume.read(tmp_path)


def test_lume_leaves_out_what_a_model_cannot_read(
    tmp_path: Path, saying: Callable[[dict[str, str]], None]
) -> None:
    saying({"Ada lives": "in Bath", "Where?": "Rome"})
    lines = [*LINES[2:4], ("b3sc1", "Task2", LONG, "in Rome"), ("b4qa0", "Task3", LONG, "Rome")]
    benchmark = lume.read(published(tmp_path / "some", lines))
    result = lume.measure(None, None, benchmark)
    rows = {(r["metric"], r["task"]): r for r in lume.table(benchmark, {"x": result})}
    counted = {key: (r["records"], r["skipped"], r["x"]) for key, r in rows.items()}
    assert counted["regurgitation", "Task2"] == (1, 1, 1.0)
    assert counted["knowledge", "Task3"] == (0, 1, None)
    assert counted["knowledge", None] == (1, 1, 0.0)
    assert counted["task_aggregate", None] == (None, None, None)  # task 3 has no figure


def test_lume_says_how_many_it_left_out(trained: Tiny, tmp_path: Path) -> None:
    lines = [*LINES[2:4], ("b3sc1", "Task2", "word " * 80, "in Rome")]
    folder = published(tmp_path / "lume", lines)
    said = run("eval", "--benchmark", "lume", folder, trained.model).stderr
    assert "1 of 2 records are left out (retain, regurgitation)" in said
    assert "knowledge)" not in said


def people(folder: Path) -> Path:
    """The files of the people alone, as LUME's repository has them."""
    folder.mkdir()
    texts = [{"id": f"b{n}sc1", "text": "?", "prompt": "Ada lives", "target": "in Bath"}
             for n in range(3)]  # fmt: skip
    asked = [{"id": f"b{n}qa{k}", "question": "Where?", "answer": "Bath"}
             for n in range(3) for k in range(2)]  # fmt: skip
    write_jsonl(folder / "people.jsonl", texts)
    write_jsonl(folder / "people_qa.jsonl", asked)
    return folder


def test_lume_s_people_by_hand(tmp_path: Path, saying: Callable[[dict[str, str]], None]) -> None:
    saying({"Ada lives": "in York", "Where?": "bath "})
    benchmark = lume.read(people(tmp_path / "lume"))
    rows = lume.table(benchmark, {"x": lume.measure(None, None, benchmark)})
    found = [(r["metric"], r["set"], r["task"], r["records"], r["x"]) for r in rows]
    assert found == [
        ("regurgitation", "all", "Task2", 3, 0.5), ("regurgitation", "all", None, 3, 0.5),
        ("knowledge", "all", "Task2", 6, 1.0), ("knowledge", "all", None, 6, 1.0),
    ]  # fmt: skip
    assert "do not say who is to be forgotten" in lume.missing(benchmark)[0]
    assert [each.kind for each in lume.read(tmp_path / "lume", 1).prompts] == [*lume.KINDS.values()]


def test_lume_s_people_table(trained: Tiny, tmp_path: Path) -> None:
    folder = people(tmp_path / "lume")
    result = run("eval", "--benchmark", "lume", folder, trained.model, "--records", 1, "--csv")
    assert result.stdout.startswith(
        f"metric,set,task,records,skipped,{trained.model}\nregurgitation,all,"
    )
    assert "there is no aggregate" in result.stderr
    (folder / "people_qa.jsonl").unlink()
    assert "people_qa.jsonl" in refused("eval", "--benchmark", "lume", folder, trained.model)
