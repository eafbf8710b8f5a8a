"""TOFU and LUME: figures by hand and by the dumb loop, on tiny files in the published formats."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import Tiny, refused, run, run_json, write_jsonl

from gradstore.errors import DataError, EvaluateError
from gradstore.evaluate import tofu
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


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models' own answers are short, where it is not they that matter."""
    monkeypatch.setattr(tofu, "LONGEST", 4)


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


@pytest.mark.usefixtures("brief")
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
    """Answers whose probability is 0.5 on average, and whose ROUGE is 0.75."""
    count = len(ratios)
    return tofu.Answers(
        np.linspace(0.25, 0.75, count), np.linspace(1.0, 0.5, count), np.log(ratios)
    )


def test_tofu_s_figures_in_closed_form() -> None:
    answers = made(0.5, 2.0, 0.25)
    assert tofu.figure("retain", answers, "probability") == 0.5
    assert tofu.figure("forget", answers, "rouge_l") == 0.75
    assert tofu.figure("forget", answers, "truth_ratio") == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert tofu.figure("retain", answers, "truth_ratio") == pytest.approx((0.5 + 0 + 0.75) / 3)
    far = tofu.Answers(np.ones(1), np.ones(1), np.array([5000.0]))
    assert tofu.figure("forget", far, "truth_ratio") == 0
    assert tofu.figure("retain", far, "truth_ratio") == 0
    measured = {"forget": made(9.0, 9.0), "retain": made(0.5, 0.5), "world_facts": made(0.2, 0.2)}
    assert tofu.model_utility(measured) is None
    measured["real_authors"] = made(0.4, 0.4)
    nine = [0.5, 0.75, 0.5, 0.5, 0.75, 0.6, 0.5, 0.75, 0.8]
    assert tofu.model_utility(measured) == pytest.approx(stats.hmean(nine))
    assert tofu.model_utility(measured | {"retain": made(1.0, 1.0)}) == 0


def test_forget_quality_is_scipy_s_and_needs_a_retain_model() -> None:
    draw = np.random.default_rng(0)
    one, other = (tofu.Answers(np.ones(30), np.ones(30), draw.normal(m, 1, 30)) for m in (0, 0.8))
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


@pytest.mark.usefixtures("brief")
def test_a_folder_that_is_named_as_a_column(
    trained: Tiny, authors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("original").symlink_to(trained.model)
    few = ("--records", 1, "--split", "forget01")
    [row, *_] = run_json("eval", "--benchmark", "tofu", authors, "original", *few,
                         "--before", trained.model)  # fmt: skip
    assert list(row)[4:] == ["original", str(trained.model.resolve())]


@pytest.mark.usefixtures("brief")
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
    assert header == f"metric,set,records,skipped,original,{column},reference"
    assert last == "forget_quality,forget,2,0,1.0,1.0,"
    assert "retain model" not in result.stderr
    other = ("--template", "Q {question} A {answer}", "--records", 1)
    changed = run_json("eval", "--benchmark", "tofu", authors, trained.model, *other)
    assert changed[0]["records"] == 1
    assert changed[0][column] != rows[0][column]


@pytest.mark.usefixtures("brief")
def test_what_a_model_cannot_read_is_left_out_and_counted(
    trained: Tiny, authors: Path, tmp_path: Path
) -> None:
    folder, long = shutil.copytree(authors, tmp_path / "long"), "word " * 80
    ada, gus = (asked(n, 3, paraphrased_answer=f"{n}: Bath.") for n in ("Ada", "Gus"))
    rows = [ada, {**ada, "question": long}, gus, {**gus, "perturbed_answer": ["Rome", long]}]
    write_jsonl(folder / "forget10_perturbed.json", rows)
    write_jsonl(folder / "world_facts_perturbed.json", [{**asked("tea", 3), "answer": long}])
    given = (trained.model, "--reference", trained.model, "--json")
    result = run("eval", "--benchmark", "tofu", folder, *given)
    found = json.loads(result.stdout)
    whole = json.loads(run("eval", "--benchmark", "tofu", authors, *given).stdout)
    column = str(trained.model)
    assert [row["skipped"] for row in found] == [2] * 3 + [0] * 6 + [1] * 3 + [None, 2]
    assert all(row["skipped"] in (0, None) for row in whole)
    for row, same in zip(found[:9], whole[:9], strict=True):
        assert row[column] == pytest.approx(same[column])  # of the records that are left
        assert row["records"] == same["records"]
    assert {row[column] for row in found[9:13]} == {None}  # no fact is left, so no utility
    assert found[-1][column] == 1
    assert "2 of 4 records are left out (forget)" in result.stderr
    assert "1 of 1 records are left out (world_facts)" in result.stderr


def test_columns_are_of_the_records_that_every_model_can_read() -> None:
    short, long = made(1.0, 1.0), made(1.0, 1.0)
    assert short.log_ratio is not None
    for values in (short.probability, short.rouge_l, short.log_ratio):
        values[0] = np.nan
    [row, *_] = tofu.table({"short": {"forget": short}, "long": {"forget": long}})
    assert (row["records"], row["skipped"], row["short"], row["long"]) == (1, 1, 0.75, 0.75)
    some, all_of = made(math.nan, 1.0, 1.0), made(9.0, 2.0, 2.0)
    some.rouge_l[0] = np.nan
    quality = tofu.forget_quality({"forget": some}, {"forget": all_of})
    assert quality == pytest.approx(stats.ks_2samp([1, 1], [2, 2]).pvalue)


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
    for option, attack in (("--relearn-lr", "relearn"), ("--candidates", "exposure")):
        said = refused(*store, option, 3, "--attack", "quantize", code=2)
        assert f"{option} belongs to --attack {attack}" in said
    assert "neither forget.jsonl nor people.jsonl" in refused(*base, "lume", authors, trained.model)
