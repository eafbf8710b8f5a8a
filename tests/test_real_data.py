"""The main job on real input: biographies with UUIDs, GPT-2's own tokenizer, every command.

Needs the folder that GRADSTORE_REAL_DATA names, with `lume/people.jsonl`, `lume/people_qa.jsonl`
and `tokenizer_gpt2/`.
"""

import json
import os
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import run_json, write_jsonl
from transformers import AutoModelForCausalLM

from gradstore import Store
from gradstore.evaluate import lume
from gradstore.training.ingest import save_checkpoint
from gradstore.training.model import load_tokenizer, new_model

REAL = Path(os.environ.get("GRADSTORE_REAL_DATA", ""))
pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("GRADSTORE_REAL_DATA"),
        reason="GRADSTORE_REAL_DATA names no folder with real data",
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
MODEL = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 256}


def test_train_forget_and_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    people = (REAL / "lume" / "people.jsonl").read_text().splitlines()
    Path("train.jsonl").write_text("\n".join(people[:24]) + "\n")
    Path("unseen.jsonl").write_text("\n".join(people[300:308]) + "\n")
    Path("gpt2.json").write_text(json.dumps(MODEL))
    cli, runner = import_module("gradstore.cli.main").cli, CliRunner()

    def run(*arguments: str, code: int = 0) -> str:
        result = runner.invoke(cli, [*arguments, "-s", "store"] if arguments[0] != "init" else
                               list(arguments))  # fmt: skip
        assert result.exit_code == code, result.output
        return result.stdout

    run("init", "store")
    run("ingest", "train.jsonl", "--config", "gpt2.json", "--tokenizer",
        str(REAL / "tokenizer_gpt2"), "--holdout", "unseen.jsonl", "--out", "trained",
        "--epochs", "3", "--epochs-captured", "all", "--lr", "3e-3", "--max-length", "64",
        "--truncate")  # fmt: skip
    ids = [json.loads(line)["id"] for line in people[:12]]
    [learned] = json.loads(run("sql", "SELECT max(loss) AS loss FROM gradients", "--json"))
    dose = ("--dose", f"target:{learned['loss'] + 0.2}", "--max-holdout-increase", "5")
    run("forget", ids[0], "--model", "trained", "--out", "one", *dose)
    run("forget", *ids[2:12], "--model", "trained", "--out", "ten", *dose)
    asked = "SELECT request_id, count(*) AS people, avg(loss_after - loss_before) AS rise " \
        "FROM forgotten GROUP BY request_id ORDER BY request_id"  # fmt: skip
    one, ten = json.loads(run("sql", asked, "--json"))
    assert (one["people"], ten["people"]) == (1, 10)
    assert one["rise"] > 0
    assert ten["rise"] > 0
    facts = json.loads(run("stats", "--json"))[0]
    assert facts["gradients"] == 72
    shown = json.loads(run("show", ids[0], "--json"))
    assert [gradient["epoch"] for gradient in shown["gradients"]] == [1, 2, 3]

    before = AutoModelForCausalLM.from_pretrained("trained").state_dict()
    after = AutoModelForCausalLM.from_pretrained("ten").state_dict()
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved == {"transformer.wte.weight", "lm_head.weight"}
    with Store.open("store") as store:
        errors = store.rows("SELECT relative_error FROM exposures WHERE relative_error IS NOT NULL")
    assert errors
    assert all(error < 0.05 for (error,) in errors)


def fresh(folder: Path) -> Path:
    """A checkpoint that knows nothing, with GPT-2's tokenizer."""
    config = folder / "gpt2.json"
    config.write_text(json.dumps(MODEL))
    tokenizer = load_tokenizer(REAL / "tokenizer_gpt2")
    save_checkpoint(new_model(config, tokenizer, 0), tokenizer, folder / "fresh")
    return folder / "fresh"


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tofu_as_published(tmp_path: Path) -> None:
    rows = run_json("eval", "--benchmark", "tofu", REAL / "tofu", fresh(tmp_path), "--split",
                    "forget01", "--records", 2, "--reference", tmp_path / "fresh")  # fmt: skip
    assert rows[-1]["metric"] == "forget_quality"
    assert rows[-1][str(tmp_path / "fresh")] == 1
    truth = {row["metric"]: row["reference"] for row in rows if row["set"] == "forget"}
    assert truth["probability"] == pytest.approx(1 / 50257, rel=0.5)
    assert truth["truth_ratio"] > 0.5


def test_lume_as_published(tmp_path: Path) -> None:
    people = _rows(REAL / "lume" / "people.jsonl")
    asked = _rows(REAL / "lume" / "people_qa.jsonl")
    rows = [(r["id"], r["prompt"], r["target"]) for r in (people[0], people[300])]
    rows += [(r["id"], r["question"], r["answer"]) for r in (asked[0], asked[1500])]
    for at, name in enumerate(("forget", "retain")):
        lines = [{"id": i, "input": a, "output": b, "task": "Task2"} for i, a, b in rows[at::2]]
        write_jsonl(tmp_path / f"{name}.jsonl", lines)
    found = run_json("eval", "--benchmark", "lume", tmp_path, fresh(tmp_path))
    assert [row["records"] for row in found if row["task"] == "Task2"] == [1] * 4
    assert found[-1]["metric"] == "task_aggregate"
    assert found[-1][str(tmp_path / "fresh")] == 0  # what stays is not known either


def test_lume_as_its_repository_has_it(tmp_path: Path) -> None:
    (config := tmp_path / "gpt2.json").write_text(json.dumps(MODEL))
    tokenizer = load_tokenizer(REAL / "tokenizer_gpt2")
    save_checkpoint(new_model(config, tokenizer, seed=0), tokenizer, tmp_path / "model")
    asked = ("eval", "--benchmark", "lume", REAL / "lume", tmp_path / "model", "--records", 2)
    rows = run_json(*asked)
    assert [(row["metric"], row["set"], row["task"], row["records"]) for row in rows] == [
        (kind, "all", task, 2)
        for kind in ("regurgitation", "knowledge")
        for task in ("Task2", None)
    ]  # fmt: skip
    kinds = [each.kind for each in lume.read(REAL / "lume").prompts]
    assert (kinds.count("regurgitation"), kinds.count("knowledge")) == (500, 2500)
