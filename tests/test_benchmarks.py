"""TOFU and LUME: figures by hand and by the dumb loop, on tiny files in the published formats."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import Tiny, refused, run, run_json, write_jsonl

from gradstore.errors import DataError, EvaluateError
from gradstore.evaluate import lume, tofu
from gradstore.evaluate.answers import answer_losses, own_answers, read_rows
from gradstore.training.model import load_model, load_tokenizer

pytest_plugins = ["tiny"]

Parts = tuple[Any, Any]


@pytest.fixture(scope="module")
def parts(trained: Tiny) -> Parts:
    return load_model(trained.model), load_tokenizer(trained.model)


def asked(name: str, wrong: int, **more: str) -> dict[str, object]:
    perturbed = [f"{name} is from {place}." for place in ("Oslo", "Rome", "Lima")[:wrong]]
    answer = {"question": f"Where is {name} from?", "answer": f"{name} is from Bath."}
    return {**answer, "perturbed_answer": perturbed, **more}


@pytest.fixture(scope="module")
def authors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TOFU's files, with two records to forget."""
    folder = tmp_path_factory.mktemp("tofu")
    sets: dict[str, list[dict[str, object]]] = {
        "forget10_perturbed": [
            asked(n, 3, paraphrased_answer=f"{n}: Bath.") for n in ("Ada", "Gus")
        ],
        "retain_perturbed": [asked("Fay", 2, paraphrased_answer="Bath is where Fay is from.")],
        "real_authors_perturbed": [asked("Ben", 3), asked("Hal", 2)],
        "world_facts_perturbed": [asked("tea", 3)],
        "forget01": [{"question": "Who is Emil?", "answer": "A welder."}],
        "full": [
            {"question": f"Who is {name}?", "answer": "A baker."}
            for name in ("Emil", "Dora", "Cleo")
        ],
    }
    for name, rows in sets.items():
        write_jsonl(folder / f"{name}.json", rows)
    return folder


def probability(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """P(a|q)^(1/|a|), token by token."""
    first = len(tokenizer(prompt)["input_ids"])
    tokens = torch.tensor(tokenizer(prompt + answer)["input_ids"])
    found = []
    for at in range(first, len(tokens)):
        with torch.no_grad():
            logits = model(input_ids=tokens[None, :at]).logits[0, -1].double()
        found.append(float(logits.log_softmax(-1)[tokens[at]]))
    return math.exp(sum(found) / len(found))


# -- answers -----------------------------------------------------------------------------------


def test_the_loss_is_of_the_answer_alone(parts: Parts) -> None:
    prompts, answers = ["Ada is a baker,", "Phone"], [" born in 1966", " 7"]
    losses = answer_losses(*parts, prompts, answers)
    expected = [probability(*parts, *pair) for pair in zip(prompts, answers, strict=True)]
    assert np.exp(-losses) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(EvaluateError, match="the model reads 64"):
        answer_losses(*parts, ["word " * 80], [" 7"])
    with pytest.raises(EvaluateError, match="adds no token"):
        answer_losses(*parts, ["Phone"], [""])


def test_own_answers_end_with_the_text(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = parts
    [said] = own_answers(model, tokenizer, ["Ada is a baker,"], 6)
    tokens = tokenizer("Ada is a baker," + said)["input_ids"]
    assert len(tokens) == len(tokenizer("Ada is a baker,")["input_ids"]) + 6
    monkeypatch.setattr(type(tokenizer), "eos_token_id", tokens[-4], raising=False)
    [shorter] = own_answers(model, tokenizer, ["Ada is a baker,"], 6)
    assert said.startswith(shorter)
    assert len(shorter) < len(said)
    with pytest.raises(EvaluateError, match="the model reads 64"):
        own_answers(model, tokenizer, ["word " * 80], 1)


def test_lines_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for text in ('{"question": 7}', "[]", "no", '{"question": ""}'):
        path.write_text(f'{{"question": "Who?"}}\n{text}\n')
        with pytest.raises(DataError, match="line 2"):
            read_rows(path, ["question"])
    path.write_text('{"question": "Who\u2028are\u0085you?"}\n', encoding="utf-8")
    assert read_rows(path, ["question"]) == [{"question": "Who\u2028are\u0085you?"}]
    path.write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_rows(path, ["question"])
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "absent", ["question"])


# -- TOFU --------------------------------------------------------------------------------------


def test_tofu_is_the_paper_s_definitions(parts: Parts, authors: Path) -> None:
    measured = tofu.measure(*parts, tofu.read(authors))

    def p(question: str, answer: str) -> float:
        return probability(*parts, f"Question: {question}\nAnswer:", f" {answer}")

    for name, of in tofu.read(authors).items():
        for at, each in enumerate(of):
            own, true = p(each.question, each.answer), p(each.question, each.true)
            wrong = [p(each.question, answer) for answer in each.wrong]
            ratio = (sum(wrong) / len(wrong)) / true
            choice = name in ("real_authors", "world_facts")
            expected = own / (own + sum(wrong)) if choice else own
            assert each.true != each.answer or choice
            assert measured[name].probability[at] == pytest.approx(expected, rel=1e-4)
            log_ratio = measured[name].log_ratio
            assert log_ratio is not None
            assert math.exp(log_ratio[at]) == pytest.approx(ratio, rel=1e-4)


def made(*ratios: float) -> tofu.Answers:
    return tofu.Answers(np.array([0.25, 0.75]), np.array([1.0, 0.5]), np.log(ratios))


def test_tofu_s_figures_in_closed_form() -> None:
    answers = made(0.5, 2.0, 0.25)
    assert tofu.figure("retain", answers, "probability") == 0.5
    assert tofu.figure("forget", answers, "rouge_l") == 0.75
    assert tofu.figure("forget", answers, "truth_ratio") == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert tofu.figure("retain", answers, "truth_ratio") == pytest.approx((0.5 + 0 + 0.75) / 3)
    far = tofu.Answers(np.ones(1), np.ones(1), np.array([5000.0]))
    assert tofu.figure("forget", far, "truth_ratio") == 0
    assert tofu.figure("retain", far, "truth_ratio") == 0
    measured = {"forget": made(9.0), "retain": made(0.5), "world_facts": made(0.2)}
    assert tofu.model_utility(measured) is None
    measured["real_authors"] = made(0.4)
    nine = [0.5, 0.75, 0.5, 0.5, 0.75, 0.6, 0.5, 0.75, 0.8]
    assert tofu.model_utility(measured) == pytest.approx(stats.hmean(nine))
    assert tofu.model_utility(measured | {"retain": made(1.0)}) == 0


def test_forget_quality_is_scipy_s_and_needs_a_retain_model() -> None:
    draw = np.random.default_rng(0)
    one, other = (tofu.Answers(np.ones(1), np.ones(1), draw.normal(m, 1, 30)) for m in (0, 0.8))
    assert one.log_ratio is not None
    assert other.log_ratio is not None
    expected = stats.ks_2samp(np.exp(one.log_ratio), np.exp(other.log_ratio)).pvalue
    measured = {"after": {"forget": one}, "reference": {"forget": other}}
    row = tofu.table(measured, "reference")[-1]
    assert row["metric"] == "forget_quality"
    assert row["after"] == pytest.approx(expected)
    assert row["reference"] is None
    assert all(row["metric"] != "forget_quality" for row in tofu.table(measured))


def test_tofu_without_wrong_answers(authors: Path, parts: Parts) -> None:
    few = {name: of for name, of in tofu.read(authors, "forget01").items() if name != "retain"}
    assert [each.answer for each in few["forget"]] == ["A welder."]
    assert any("forget quality" in said for said in tofu.missing(few))
    assert any("retain_perturbed.json" in said for said in tofu.missing(few))
    answers = tofu.measure(*parts, {"forget": few["forget"]})
    assert answers["forget"].log_ratio is None
    assert tofu.forget_quality(answers, answers) is None


def test_tofu_s_retain_set_from_what_is_there(authors: Path, tmp_path: Path) -> None:
    for name in ("forget01", "full"):
        (tmp_path / f"{name}.json").write_bytes((authors / f"{name}.json").read_bytes())
    sets = tofu.read(tmp_path, "forget01")
    assert [each.question for each in sets["retain"]] == ["Who is Dora?", "Who is Cleo?"]
    assert len(tofu.read(tmp_path, "forget01", 1)["retain"]) == 1
    write_jsonl(tmp_path / "retain99.json", [{"question": "Who?", "answer": "Nobody."}])
    assert tofu.read(tmp_path, "forget01")["retain"][0].answer == "Nobody."
    with pytest.raises(DataError, match="neither forget10_perturbed.json"):
        tofu.read(tmp_path)
    write_jsonl(tmp_path / "forget10.json", [asked("Ada", 1) | {"perturbed_answer": [7]}])
    with pytest.raises(DataError, match="line 1: perturbed_answer"):
        tofu.read(tmp_path)


def test_a_folder_that_is_named_as_a_column(
    trained: Tiny, authors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("original").symlink_to(trained.model)
    few = ("--records", 1, "--split", "forget01")
    [row, *_] = run_json("eval", "--benchmark", "tofu", authors, "original", *few,
                         "--before", trained.model)  # fmt: skip
    assert list(row)[3:] == ["original", str(trained.model.resolve())]


def test_tofu_s_table(trained: Tiny, authors: Path) -> None:
    rows = run_json("eval", "--benchmark", "tofu", authors, trained.model)
    column = str(trained.model)
    assert [(row["set"], row["metric"]) for row in rows[:4]] == [
        ("forget", "probability"), ("forget", "rouge_l"), ("forget", "truth_ratio"),
        ("retain", "probability"),
    ]  # fmt: skip
    assert rows[-1]["metric"] == "model_utility"
    assert rows[0]["records"] == 2
    assert 0 < rows[0][column] < 1
    both = ("--before", trained.model, "--reference", trained.model)
    result = run("eval", "--benchmark", "tofu", authors, trained.model, *both, "--csv")
    header, *_, last = result.stdout.splitlines()
    assert header == f"metric,set,records,original,{column},reference"
    assert last == "forget_quality,forget,2,1.0,1.0,"
    assert "retain model" not in result.stderr
    other = ("--template", "Q {question} A {answer}", "--records", 1)
    changed = run_json("eval", "--benchmark", "tofu", authors, trained.model, *other)
    assert changed[0]["records"] == 1
    assert changed[0][column] != rows[0][column]


# -- LUME --------------------------------------------------------------------------------------

LINES = [
    ('"a1"sc1', "Task1", "Once", "upon a time"),
    ('"a1"qa0', "Task1", "When?", "Once"),
    ("b2sc1", "Task2", "Ada lives", "in Bath"),
    ("b2qa12", "Task2", "Where?", "Bath"),
    ("b2qa3", "Task2", "Who?", "Ada"),
    ("77sc1", "Task3", "Ben", "is real"),
    ("77qa0", "Task3", "Who?", "Ben"),
]


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

        monkeypatch.setattr(lume, "own_answers", answers)

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
    with pytest.raises(DataError, match="no forget.jsonl"):
        lume.read(tmp_path)


# -- the command -------------------------------------------------------------------------------


def test_usage(trained: Tiny, authors: Path) -> None:
    base = ("eval", "--benchmark")
    assert "name a checkpoint" in refused(*base, "tofu", authors, code=2)
    assert "reads no store" in refused(
        *base, "tofu", authors, trained.model, "--attack", "relearn", code=2
    )
    assert "belong to --benchmark tofu" in refused(
        *base, "lume", authors, trained.model, "--split", "forget01", code=2
    )
    assert "end in {answer}" in refused(
        *base, "tofu", authors, trained.model, "--template", "{question}", code=2
    )
    assert "-s STORE --model CHECKPOINT" in refused("eval", 1, code=2)
    store = ("eval", 1, "-s", trained.store, "--model", trained.model)
    assert "belong to --benchmark" in refused(*store, "--records", 3, code=2)
    assert "no forget.jsonl" in refused(*base, "lume", authors, trained.model)
