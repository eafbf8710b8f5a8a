"""The main job on real input: biographies with UUIDs, GPT-2's own tokenizer, every command.

Needs the folder that GRADSTORE_REAL_DATA names, with `lume/people.jsonl` and `tokenizer_gpt2/`.
"""

import json
import os
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from gradstore import Store

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
