"""A day's work through the command line: init, ingest, look, forget, ask."""

import csv
import json
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    BATCH,
    EPOCHS,
    FAR,
    FRESH,
    HELD_OUT,
    TRAINED,
    Tiny,
    counts,
    digests,
    files,
    run,
    run_json,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest_plugins = ["tiny"]
GROUP: click.Group = import_module("gradstore.cli.main").cli
EMBEDDING = "transformer.wte.weight"
STEPS = EPOCHS * TRAINED // BATCH


def rows(store: Path, query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run_json("sql", query, "-s", store)
    return found


def table_of(text: str) -> list[list[str]]:
    """The cells of a printed table, without its title and rule; none of them may be empty."""
    lines = [line.split() for line in text.splitlines()]
    return [cells for cells in lines if cells and not set(cells[0]) <= {"─"}]


# -- init and ingest ---------------------------------------------------------------------------


def test_init_makes_an_empty_store_and_tells_the_next_step(tmp_path: Path) -> None:
    result = run("init", tmp_path / "new", "--profile", "raw", "--dtype", "float32")
    assert result.stdout == ""
    assert "next: gradstore ingest" in result.stderr
    stated = json.loads((tmp_path / "new" / "gradstore.json").read_text())
    assert (stated["profile"], stated["dtype"], stated["model"]) == ("raw", "float32", None)


def test_ingest_keeps_every_exposure_of_every_record(trained: Tiny) -> None:
    [run_row] = rows(trained.store, "SELECT name, status, steps, epochs_captured FROM runs")
    assert run_row == {
        "name": "run-1", "status": "finished", "steps": STEPS, "epochs_captured": "all",
    }  # fmt: skip
    met = rows(trained.store, "SELECT id, epoch, step, loss FROM gradients ORDER BY id, epoch")
    ids = [f"p-{number:02d}" for number in range(1, TRAINED + 1)]
    assert [(m["id"], m["epoch"]) for m in met] == [(i, e) for i in ids for e in (1, 2)]
    assert sorted(m["step"] for m in met) == [s for s in range(1, STEPS + 1) for _ in range(BATCH)]
    epochs = [[m["loss"] for m in met if m["epoch"] == epoch] for epoch in (1, 2)]
    assert sum(epochs[1]) < sum(epochs[0]) - TRAINED  # it has learned
    held = rows(trained.store, "SELECT epoch, count(*) AS n FROM holdout_losses GROUP BY epoch")
    assert sorted((h["epoch"], h["n"]) for h in held) == [(e, HELD_OUT) for e in (0, 1, 2)]


def test_ingest_prints_the_run_and_where_things_lie(tmp_path: Path) -> None:
    tiny = files(tmp_path)
    run("init", tiny.store)
    arguments = ["ingest", tiny.data, "-s", tiny.store, "--config", tiny.config, *FRESH,
                 "--holdout", tiny.holdout, "--out", tiny.model]  # fmt: skip
    before = digests(tmp_path)
    dry = run(*arguments, "--dry-run")
    assert (dry.stdout, digests(tmp_path)) == ("", before)
    assert f"would train GPT2LMHeadModel on {TRAINED * 12} tokens" in dry.stderr
    result = run(*arguments, "--run", "mine", "--epochs", 1)
    names, values = table_of(result.stdout)
    printed = dict(zip(names, values, strict=True))
    mean = rows(tiny.store, "SELECT avg(loss) AS loss FROM exposures")[0]["loss"]
    assert float(printed.pop("first_loss")) == pytest.approx(mean, rel=1e-3)
    assert float(printed.pop("last_loss")) == pytest.approx(mean, rel=1e-3)
    assert printed == {"run": "mine", "gradients": "24", "samples": "24", "epochs": "1"}
    assert f"checkpoint: {tiny.model}" in result.stderr
    assert "0:00:00" in result.stderr  # the progress bar has ended there
    assert not (tiny.model / "checkpoints").exists()


def test_a_checkpoint_is_one_of_transformers(trained: Tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained.model)
    tokenizer = AutoTokenizer.from_pretrained(trained.model)
    assert model.config.n_embd == 32
    assert model.config.vocab_size == len(tokenizer) <= 400
    assert tokenizer.decode(tokenizer("Ada is a baker")["input_ids"]) == "Ada is a baker"
    [row] = rows(trained.store, "SELECT checkpoint FROM runs")
    assert Path(row["checkpoint"]) == trained.model.resolve()


def test_fine_tuning_goes_on_in_the_same_store(copied: Tiny, tmp_path: Path) -> None:
    table = tmp_path / "people.csv"
    table.write_text("uuid,bio\nz-1,Ada is a baker.\nz-2,Ben is a painter.\n")
    options = ["--id-field", "uuid", "--text-field", "bio", "--epochs", 1, "--bf16",
               "--activation-checkpointing", "--sides", "input", "--accumulate", 2]  # fmt: skip
    run("ingest", table, "-s", copied.store, "--model", copied.model, "--out", tmp_path / "more",
        *options)  # fmt: skip
    met = rows(copied.store, "SELECT id, run, h_norm FROM gradients WHERE run_id = 2 ORDER BY id")
    assert [tuple(m.values()) for m in met] == [("z-1", "run-2", None), ("z-2", "run-2", None)]


# -- look --------------------------------------------------------------------------------------


def test_list_narrows_by_prefix_split_and_limit(trained: Tiny) -> None:
    everyone = run_json("list", "-s", trained.store)
    assert len(everyone) == TRAINED + HELD_OUT
    assert {(r["split"], r["gradients"]) for r in everyone} == {("train", 2), ("holdout", 0)}
    tens = run_json("list", "p-1", "-s", trained.store)
    assert sorted(r["id"] for r in tens) == [f"p-1{digit}" for digit in range(10)]
    assert all(r["last_loss"] < r["first_loss"] and r["requests"] == 0 for r in tens)
    held = run_json("list", "--split", "holdout", "-s", trained.store)
    assert sorted(r["id"] for r in held) == [f"h-0{n}" for n in range(1, HELD_OUT + 1)]
    few = run("list", "--limit", 3, "--csv", "-s", trained.store)
    assert len(few.stdout.splitlines()) == 1 + 3
    assert "more than 3" in few.stderr


def test_show_has_the_sample_and_its_gradients(trained: Tiny) -> None:
    shown = run_json("show", "p-07", "-s", trained.store)
    assert [s["id"] for s in shown["sample"]] == ["p-07"]
    assert [g["epoch"] for g in shown["gradients"]] == [1, 2]
    assert all(g["d_norm"] > 0 and g["h_norm"] > 0 for g in shown["gradients"])
    assert shown["requests"] == []
    table = run("show", "p-07", "-s", trained.store).stdout
    assert table.split()[:2] == ["sample", "id"]
    assert run_json("show", "h-03", "-s", trained.store)["gradients"] == []


def test_runs_schema_and_stats(trained: Tiny) -> None:
    [training] = run_json("runs", "-s", trained.store)
    assert (training["kind"], training["status"]) == ("training", "finished")
    assert training["loss_after"] < training["loss_before"]
    tables = {row["table"] for row in run_json("schema", "-s", trained.store)}
    assert tables >= {"samples", "runs", "segments", "exposures", "requests", "scores", "paths"}
    columns = run_json("schema", "exposures", "-s", trained.store)
    assert {row["table"] for row in columns} == {"exposures"}
    assert all(row["comment"].endswith((".", ")")) for row in columns)
    printed = run("schema", "exposures", "-s", trained.store).stdout
    assert all(row["column"] in printed for row in columns)
    [facts] = run_json("stats", "-s", trained.store)
    assert (facts["samples"], facts["held_out"], facts["gradients"]) == (24, 8, 48)
    on_disk = sum(path.stat().st_size for path in trained.store.rglob("*") if path.is_file())
    assert facts["store_bytes"] == on_disk
    assert dict(table_of(run("stats", "-s", trained.store).stdout)[1:])["gradients"] == "48"


QUERY = """SELECT id, epoch, step, (loss * 1000)::INTEGER AS millinats FROM gradients
           WHERE epoch = 2 ORDER BY id LIMIT 5"""


def test_sql_gives_the_same_rows_in_every_form(trained: Tiny) -> None:
    as_json = rows(trained.store, QUERY)
    assert len(as_json) == 5
    assert list(as_json[0]) == ["id", "epoch", "step", "millinats"]
    as_text = [{name: str(value) for name, value in row.items()} for row in as_json]
    for_stdin = run("sql", "-", "--csv", "-s", trained.store, stdin=QUERY).stdout
    assert list(csv.DictReader(StringIO(for_stdin))) == as_text
    for form in ([], ["--table"]):
        names, *cells = table_of(run("sql", QUERY, "-s", trained.store, *form).stdout)
        assert [dict(zip(names, row, strict=True)) for row in cells] == as_text


def test_sql_prints_what_json_cannot_say_and_names_that_repeat(trained: Tiny) -> None:
    query = """SELECT 'nan'::DOUBLE AS a, ['-inf'::DOUBLE, 1] AS a, DATE '2024-02-29' AS c,
                      {'x': NULL} AS d, '[bold]"q",' AS e"""
    [row] = rows(trained.store, query)
    assert row == {
        "a": None, "a_1": [None, 1.0], "c": "2024-02-29", "d": {"x": None}, "e": '[bold]"q",',
    }  # fmt: skip
    [comma] = csv.DictReader(StringIO(run("sql", query, "--csv", "-s", trained.store).stdout))
    assert comma["e"] == '[bold]"q",'
    assert '[bold]"q",' in run("sql", query, "-s", trained.store).stdout
    nothing = "SELECT id FROM samples WHERE false"
    assert rows(trained.store, nothing) == []
    assert run("sql", nothing, "--csv", "-s", trained.store).stdout == "id\n"


def test_the_store_may_come_from_the_environment(
    trained: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADSTORE_STORE", str(trained.store))
    assert run_json("sql", "SELECT 6 * 7 AS answer") == [{"answer": 42}]


# -- forget ------------------------------------------------------------------------------------


def test_forget_moves_the_embedding_alone_and_records_it(copied: Tiny, tmp_path: Path) -> None:
    before, out = digests(copied.model), tmp_path / "new" / "forgotten"
    printed = run_json("forget", "p-07", "p-11", "-s", copied.store, "--model", copied.model,
                       "--out", out, *FAR)  # fmt: skip
    assert digests(copied.model) == before
    assert not list(out.parent.glob(".tmp*"))
    AutoModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)
    old, new = (load_file(folder / "model.safetensors") for folder in (copied.model, out))
    assert old.keys() == new.keys()
    assert [name for name in old if not torch.equal(old[name], new[name])] == [EMBEDDING]

    [request] = rows(copied.store, "SELECT * FROM requests")
    assert (request["direction"], request["dose"], request["verdict"]) == (
        "newton",
        4,
        "forgotten",
    )
    assert Path(request["model_out"]) == out.resolve()
    forgotten = rows(
        copied.store, "SELECT id, loss_before, loss_after, target, way FROM forgotten ORDER BY id"
    )
    own = [{name: f.pop(name) for name in ("low", "high", "outcome")} for f in printed["forgotten"]]
    assert printed["forgotten"] == forgotten
    assert all(o["low"] < f["target"] < o["high"] for o, f in zip(own, forgotten, strict=True))
    assert [o["outcome"] for o in own] == ["forgotten", "forgotten"]
    assert [f["id"] for f in forgotten] == ["p-07", "p-11"]
    assert all(f["loss_after"] > f["loss_before"] for f in forgotten)
    roles = rows(copied.store, "SELECT role, samples FROM collateral ORDER BY role")
    assert [tuple(r.values()) for r in roles] == [
        ("forget", 2), ("holdout", HELD_OUT), ("retained", TRAINED - 2),
    ]  # fmt: skip
    path = rows(copied.store, "SELECT * FROM paths ORDER BY dose")
    assert [p["dose"] for p in path if p["chosen"]] == [4]
    assert [p["dose"] for p in path] == [p["dose"] for p in printed["path"]]
    assert path[0]["dose"] == 0
    assert len(path) >= 6
    assert run_json("show", "p-07", "-s", copied.store)["requests"][0]["verdict"] == "forgotten"
    assert run_json("runs", "-s", copied.store)[1]["what"] == "2 samples, newton"

    again = tmp_path / "again"  # the new checkpoint is known to come from the same run
    result = run("forget", "p-01", "-s", copied.store, "--model", out, "--out", again, *FAR)
    assert "does not know" not in result.stderr
    roles = rows(copied.store, "SELECT id, role FROM scores JOIN samples USING (sample_id) "
                               "WHERE request_id = 2 AND role <> 'holdout'")  # fmt: skip
    stay = {row["id"] for row in roles if row["role"] == "retained"}
    assert len(stay) == TRAINED - 3  # what the first request took away does not stay
    assert not {"p-01", "p-07", "p-11"} & stay


def test_the_default_dose_is_what_is_left_of_the_steps(copied: Tiny, tmp_path: Path) -> None:
    arguments = ["forget", "p-07", "-s", copied.store, "--model", copied.model, "--out",
                 tmp_path / "out"]  # fmt: skip
    result = run(*arguments, "--csv", code=None)
    [printed] = csv.DictReader(StringIO(result.stdout))
    assert printed["id"] == "p-07"
    [request] = rows(copied.store, "SELECT * FROM requests")
    assert (request["direction"], request["dose"]) == ("applied", 1)
    assert result.exit_code == {"forgotten": 0, "partly": 3}[request["verdict"]]
    assert request["reason"] in result.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_no_limit_is_infinity(copied: Tiny, tmp_path: Path) -> None:
    run("forget", "p-07", "-s", copied.store, "--model", copied.model, "--out", tmp_path / "out",
        "--dose", 4, "--max-holdout-increase", "inf")  # fmt: skip
    [request] = rows(copied.store, "SELECT max_holdout_increase FROM requests")
    assert request == {"max_holdout_increase": None}


def test_raw_goes_to_a_target(copied: Tiny, tmp_path: Path) -> None:
    run("forget", "p-07", "-s", copied.store, "--model", copied.model, "--out", tmp_path / "out",
        "--direction", "raw", "--dose", "target:3.5", "--max-holdout-increase", 9)  # fmt: skip
    [request] = rows(copied.store, "SELECT direction, target, verdict FROM requests")
    assert request == {"direction": "raw", "target": 3.5, "verdict": "forgotten"}
    [score] = rows(copied.store, "SELECT loss_before, loss_after FROM forgotten")
    assert score["loss_before"] < 3 < score["loss_after"] == pytest.approx(3.5, abs=0.1)


def test_a_dry_run_measures_and_writes_nothing(copied: Tiny, tmp_path: Path) -> None:
    before = digests(tmp_path), counts(copied.store)
    arguments = ["forget", "p-07", "-s", copied.store, "--model", copied.model, "--out",
                 tmp_path / "out", *FAR]  # fmt: skip
    dry = run(*arguments, "--dry-run", "--json")
    assert "dry run: nothing was written" in dry.stderr
    assert (digests(tmp_path), counts(copied.store)) == before
    shown, done = json.loads(dry.stdout), run_json(*arguments)
    assert shown["request"][0].pop("request_id") is None
    assert done["request"][0].pop("request_id") == 1
    assert (shown["request"][0].pop("out"), done["request"][0].pop("out")) == (
        None,
        str(tmp_path / "out"),
    )
    assert done == shown


def test_exit_3_where_the_limit_on_held_out_damage_forbids_it(copied: Tiny, tmp_path: Path) -> None:
    arguments = ["forget", "p-07", "-s", copied.store, "--model", copied.model, "--out",
                 tmp_path / "out"]  # fmt: skip
    refused = run(*arguments, "--dose", 1000, "--max-holdout-increase", 0, code=3)
    assert "refused" in refused.stderr
    assert not (tmp_path / "out").exists()
    partly = run(*arguments, "--dose", 40, "--max-holdout-increase", 0.5, code=3)
    assert "partly" in partly.stderr
    assert (tmp_path / "out").exists()
    requests = rows(
        copied.store, "SELECT verdict, dose, model_out FROM requests ORDER BY request_id"
    )
    assert requests[0] == {"verdict": "refused", "dose": None, "model_out": None}
    assert requests[1]["verdict"] == "partly"
    assert 0 < requests[1]["dose"] < 40
    [damage] = rows(copied.store, "SELECT change FROM collateral WHERE role = 'holdout' AND "
                                  "request_id = 2")  # fmt: skip
    assert damage["change"] <= 0.5


# -- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GROUP.commands)
def test_every_command_explains_itself(name: str) -> None:
    text = run(name, "-h").stdout
    assert text == run(name, "--help").stdout
    assert "Example" in text
    assert f"  gradstore {name}" in text
    options = [p for p in GROUP.commands[name].params if isinstance(p, click.Option)]
    assert not [option.name for option in options if not option.help]


def test_the_group_lists_every_command_and_the_exit_codes() -> None:
    text = run("-h").stdout
    assert all(f"\n  {name} " in text for name in GROUP.commands)
    assert "Exit codes: 0 fine, 1 error, 2 usage, 3" in text
