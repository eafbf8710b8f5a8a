"""Exact forgetting is the training without the record, bit for bit, or says why it cannot be."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from receipted import document, validator
from safetensors.torch import load_file
from tiny import (
    BATCH,
    EPOCHS,
    FAR,
    FRESH,
    TRAINED,
    TRAINING,
    Tiny,
    counts,
    digests,
    files,
    records,
    refused,
    run,
    run_json,
    write_jsonl,
)
from torch import Tensor

from gradstore import Store
from gradstore.identity import digest_checkpoint
from gradstore.training.corpus import read_corpus, tokenize
from gradstore.training.ingest import TrainingSettings, train
from gradstore.training.model import load_model, load_tokenizer, new_model
from gradstore.training.replay import cost
from gradstore.upkeep.verify import verify as verify_store

pytest_plugins = ["tiny"]
STEPS = EPOCHS * TRAINED // BATCH
SETTINGS = TrainingSettings(epochs=EPOCHS, batch_size=BATCH, learning_rate=0.02)


def rows(store: Path, query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run_json("sql", query, "-s", store)
    return found


def trained_without(model: Any, data: Path, tokenizer: Any, out: Path, *ids: str) -> Any:
    """The reference: the same training by hand, from the user's own files."""
    tokens = tokenize(read_corpus(data), tokenizer, 64)
    train(model, tokens, out, SETTINGS, without=ids)
    return model


def same(checkpoint: Path, model: Any) -> bool:
    expected: dict[str, Tensor] = dict(model.named_parameters())  # the tied head is one of them
    found = load_file(checkpoint / "model.safetensors")
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name].detach().cpu()) for name in found)


def exact(tiny: Tiny, out: Path, *arguments: object) -> list[object]:
    return ["forget", *arguments, "-s", tiny.store, "--model", tiny.model, "--out", out, "--exact"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, Path]:
    """A run that started from a directory, and the directory. Tests only read them."""
    tiny = files(tmp_path_factory.mktemp("tuned"))
    tokenizer_of = tiny.model.with_name("first")
    run("init", tiny.store.with_name("other"))
    run("ingest", tiny.holdout, "-s", tiny.store.with_name("other"), "--config", tiny.config,
        *FRESH, "--out", tokenizer_of)  # fmt: skip
    run("init", tiny.store)
    run("ingest", tiny.data, "-s", tiny.store, "--model", tokenizer_of, *TRAINING,
        "--out", tiny.model)  # fmt: skip
    return tiny, tokenizer_of


# -- what ingest keeps -------------------------------------------------------------------------


def test_the_order_of_the_data_is_kept_though_numbers_are_in_another(trained: Tiny) -> None:
    from gradstore.training.replay import prepare

    store = Store.open(trained.store)
    numbered = [i for (i,) in store.rows(
        "SELECT id FROM samples WHERE split = 'train' ORDER BY sample_id")]  # fmt: skip
    documents = read_corpus(trained.data)
    assert numbered != [d.id for d in documents]
    replay = prepare(store, store.run())
    expected = tokenize(documents, load_tokenizer(trained.model), 64)
    assert list(replay.tokens) == list(expected)
    assert all(torch.equal(replay.tokens[i], expected[i]) for i in expected)
    assert replay.settings == SETTINGS
    kept = json.loads(store.run()["settings"])
    assert kept["environment"]["threads"] == torch.get_num_threads()
    assert kept["environment"]["torch"] == torch.__version__


# -- the replay --------------------------------------------------------------------------------


def test_it_is_the_training_without_the_record_bit_for_bit(copied: Tiny, tmp_path: Path) -> None:
    before, out = digests(copied.model), tmp_path / "new" / "exact"
    out.parent.mkdir()
    result = run(*exact(copied, out, "p-07"), "--json")
    assert digests(copied.model) == before
    assert not list(out.parent.glob(".tmp*"))
    tokenizer = load_tokenizer(copied.model)
    start = [new_model(copied.config, tokenizer, 0) for _ in range(2)]
    reference = trained_without(start[0], copied.data, tokenizer, tmp_path / "by-hand", "p-07")
    assert same(out, reference)
    whole = trained_without(start[1], copied.data, tokenizer, tmp_path / "by-hand")
    assert same(copied.model, whole)
    assert not same(copied.model, reference)

    [request] = rows(copied.store, "SELECT * FROM requests")
    facts = ("direction", "dose", "target", "verdict", "run_id", "max_holdout_increase")
    assert [request[name] for name in facts] == ["exact", None, None, "forgotten", 1, None]
    assert request["reason"].startswith("trained again without it (run-1, 12 steps): loss ")
    assert request["reason"] in result.stderr
    assert Path(request["model_out"]) == out.resolve()
    assert f"{STEPS}/{STEPS}" in result.stderr  # the progress bar has ended there
    assert f", {STEPS} steps" in result.stderr
    forgotten = rows(copied.store, "SELECT id, loss_before, loss_after, target FROM forgotten")
    [printed] = json.loads(result.stdout)["forgotten"]
    assert printed == forgotten[0] | dict.fromkeys(("low", "high", "way")) | {
        "outcome": "forgotten"
    }
    assert [f["id"] for f in forgotten] == ["p-07"]
    assert forgotten[0]["loss_after"] > forgotten[0]["loss_before"]
    roles = rows(copied.store, "SELECT role, samples FROM collateral ORDER BY role")
    assert [tuple(r.values()) for r in roles] == [("forget", 1), ("holdout", 8), ("retained", 23)]
    assert rows(copied.store, "FROM paths") == []
    assert run_json("runs", "-s", copied.store)[1]["what"] == "1 samples, exact"


def test_it_has_a_receipt_without_an_update(copied: Tiny, tmp_path: Path) -> None:
    (copied.store / "receipts").mkdir()
    (copied.store / "receipts" / "0001.safetensors").touch()  # of a request that did not commit
    run(*exact(copied, tmp_path / "out", "p-07"))
    run("forget", "p-03", "-s", copied.store, "--model", tmp_path / "out", "--out",
        tmp_path / "then", *FAR, code=None)  # fmt: skip
    kept = sorted(path.name for path in (copied.store / "receipts").iterdir())
    assert kept == ["0001.json", "0002.json", "0002.safetensors"]
    receipt = document(tmp_path, 1)
    validator().validate(receipt)
    assert (receipt["update"], receipt["method"]["dose"]) == (None, None)
    assert receipt["method"]["direction"] == "exact"
    assert receipt["model"] == {
        "before": digest_checkpoint(copied.model), "after": digest_checkpoint(tmp_path / "out")
    }  # fmt: skip
    assert "p-07" not in json.dumps(receipt)
    assert [finding for finding in verify_store(copied.store) if finding.damage] == []

    checks = run_json("receipt", "verify", 1, "-s", copied.store)
    assert {check["check"]: check["passed"] for check in checks} == {
        "document": True, "chain": True, "model before": True, "recomputed": None,
        "model after": True,
    }  # fmt: skip
    [found] = [check["found"] for check in checks if check["passed"] is None]
    assert found.startswith("not tried (replay)")
    assert run("receipt", "verify", 1, "-s", copied.store).stderr == "receipt 1 holds\n"
    changed = tmp_path / "out" / "model.safetensors"
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    said = run("receipt", "verify", 1, "-s", copied.store, code=3).stderr
    assert said == "receipt 1 does not hold: model after\n"


def test_a_run_from_a_directory(tuned: tuple[Tiny, Path], tmp_path: Path) -> None:
    tiny, start = tuned
    tiny = replace(tiny, store=shutil.copytree(tiny.store, tmp_path / "store"))
    run(*exact(tiny, tmp_path / "out", "p-03", "p-11"))
    reference = trained_without(
        load_model(start), tiny.data, load_tokenizer(start), tmp_path / "by-hand", "p-03", "p-11"
    )
    assert same(tmp_path / "out", reference)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A run of one epoch that saved a checkpoint after every second of its six steps."""
    tiny = files(tmp_path_factory.mktemp("saved"))
    run("init", tiny.store)
    run("ingest", tiny.data, "-s", tiny.store, "--config", tiny.config, *FRESH, "--epochs", 1,
        "--save-steps", 2, "--out", tiny.model)  # fmt: skip
    return tiny


def test_it_goes_on_from_the_last_checkpoint_before_the_record_was_met(
    saved: Tiny, tmp_path: Path
) -> None:
    met = {r["id"]: r["step"] for r in rows(saved.store, "SELECT id, step FROM gradients")}
    late, early = max(met, key=lambda i: met[i]), min(met, key=lambda i: met[i])
    assert (met[late], met[early]) == (STEPS // 2, 1)
    tokenizer = load_tokenizer(saved.model)
    tokens = tokenize(read_corpus(saved.data), tokenizer, 64)
    for gone, said in (
        ((late,), r"run-1 again from checkpoint-4 without 1 of its records: about .*, 2 steps"),
        ((late, early), r"run-1 again without 2 of its records: about .*, 6 steps"),
    ):
        out = tmp_path / str(len(gone))
        again = replace(saved, store=shutil.copytree(saved.store, out.with_suffix(".store")))
        assert re.search(said, " ".join(run(*exact(again, out, *gone)).stderr.split()))
        model = new_model(saved.config, tokenizer, 0)
        train(model, tokens, tmp_path / "x", replace(SETTINGS, epochs=1), without=gone)
        assert same(out, model)


def test_only_a_checkpoint_that_is_what_was_saved_is_gone_on_from(
    saved: Tiny, tmp_path: Path
) -> None:
    [late] = rows(saved.store, "SELECT id FROM gradients WHERE step = 6 LIMIT 1")
    arguments = [*exact(saved, tmp_path / "out", late["id"]), "--dry-run"]
    fourth = saved.model / "checkpoints" / "checkpoint-4"
    aside = fourth.rename(tmp_path / "aside")
    assert "again from checkpoint-2 without" in " ".join(run(*arguments).stderr.split())
    aside.rename(fourth)
    state = fourth / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    said = " ".join(run(*arguments).stderr.split())
    assert "checkpoint-4 is not what run-1 saved: trained from the start" in said
    assert "again without 1 of its records" in said


def test_losses_are_those_of_the_checkpoint_also_after_autocast(tmp_path: Path) -> None:
    tiny = files(tmp_path)
    run("init", tiny.store)
    run("ingest", tiny.data, "-s", tiny.store, "--config", tiny.config, *FRESH, "--bf16",
        "--accumulate", 3, "--activation-checkpointing", "--out", tiny.model)  # fmt: skip
    [first] = run_json(*exact(tiny, tmp_path / "first", "p-07"))["forgotten"]
    [second] = run_json(
        *exact(replace(tiny, model=tmp_path / "first"), tmp_path / "second", "p-07")
    )["forgotten"]
    assert digests(tmp_path / "first") == digests(tmp_path / "second")
    assert first["loss_before"] != first["loss_after"]
    assert second["loss_before"] == second["loss_after"] == first["loss_after"]


def test_what_was_forgotten_before_does_not_come_back(copied: Tiny, tmp_path: Path) -> None:
    first, then = tmp_path / "first", tmp_path / "then"
    run("forget", "p-02", "-s", copied.store, "--model", copied.model, "--out", first, *FAR)
    result = run(*exact(replace(copied, model=first), then, "p-07"))
    assert "note: forgotten earlier, so left out too: p-02" in result.stderr
    both = tmp_path / "both"
    run(*exact(copied, both, "p-02", "p-07"))
    assert digests(then) == digests(both)
    ids = rows(copied.store, "SELECT id FROM forgotten WHERE request_id = 2 ORDER BY id")
    assert [r["id"] for r in ids] == ["p-02", "p-07"]
    # a third one goes back over both, and over a request that changed nothing
    run(*exact(replace(copied, model=then), tmp_path / "again", "p-07"))
    assert digests(tmp_path / "again") == digests(then)
    run(*exact(replace(copied, model=tmp_path / "again"), tmp_path / "third", "p-07"))


def test_a_dry_run_trains_and_writes_nothing(copied: Tiny, tmp_path: Path) -> None:
    before = digests(tmp_path), counts(copied.store)
    dry = run(*exact(copied, tmp_path / "out", "p-07"), "--dry-run", "--json")
    assert (digests(tmp_path), counts(copied.store)) == before
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()  # an empty folder is a place to write to, and stays one
    run(*exact(copied, tmp_path / "out", "p-07"), "--dry-run")
    assert (tmp_path / "out").is_dir()
    [shown] = json.loads(dry.stdout)["forgotten"]
    [done] = run_json(*exact(copied, tmp_path / "out", "p-07"))["forgotten"]
    assert shown == done


def test_other_verdicts_than_forgotten_name_its_cost(copied: Tiny, tmp_path: Path) -> None:
    with Store.open(copied.store) as store, store.transaction() as connection:
        connection.execute("UPDATE runs SET finished_at = started_at + INTERVAL 722 SECOND")
    arguments = ["forget", "p-07", "-s", copied.store, "--model", copied.model, "--out"]
    expected = "--exact trains run-1 again without the record: about 12 minutes, 12 steps"
    limit = ["--dose", 1000, "--max-holdout-increase", 0]
    assert expected in run(*arguments, tmp_path / "refused", *limit, code=3).stderr
    assert expected in run(*arguments, tmp_path / "partly", "--dose", 0.01, code=3).stderr
    assert "--exact" not in run(*arguments, tmp_path / "done", *FAR).stderr
    nothing = ["--dose", "target:0.01"]
    assert "--exact" not in run(*arguments, tmp_path / "no", *nothing, code=3).stderr


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "about 1 second"), (100, "about 100 seconds"), (150, "about 2 minutes"),
     (7190, "about 120 minutes"), (9000, "about 2 hours")],
)  # fmt: skip
def test_cost_is_told_in_a_unit_of_its_size(seconds: int, said: str, trained: Tiny) -> None:
    from datetime import timedelta

    row = Store.open(trained.store).run()
    row["finished_at"] = row["started_at"] + timedelta(seconds=seconds)
    assert cost(row) == f"{said}, 12 steps"


# -- what cannot be replayed -------------------------------------------------------------------


def test_ids_that_the_run_did_not_meet_are_refused(trained: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no sample has the id 'nobody'" in refused(*exact(trained, out, "nobody"))
    said = refused(*exact(trained, out, "p-07", "h-03"))
    assert said.startswith("run-1 was not trained on 'h-03'")
    assert "gradstore show h-03" in said
    assert not out.exists()


def test_options_of_the_other_way_are_usage(trained: Tiny, tmp_path: Path) -> None:
    for option in (
        ("--dose", 1),
        ("--direction", "raw"),
        ("--weights", "rising"),
        ("--from-checkpoints", trained.model),
        ("--max-holdout-increase", 0.1),
    ):
        result = run(*exact(trained, tmp_path / "out", "p-07"), *option, code=2)
        assert "it has no --direction, --dose, --weights, --layers, " in result.stderr


def test_a_start_that_changed_or_is_gone_is_refused(
    tuned: tuple[Tiny, Path], tmp_path: Path
) -> None:
    tiny, start = tuned
    aside = start.rename(start.with_name("aside"))
    try:
        said = refused(*exact(tiny, tmp_path / "out", "p-03"))
        assert said.startswith(f"run-1 started from {start}, now: ")
        assert "put back what was there" in said
        shutil.copytree(tiny.model, start)
        said = refused(*exact(tiny, tmp_path / "out", "p-03"))
        assert f"{start}, whose weights are no longer the same: SHA-256" in said
        shutil.rmtree(start)
    finally:
        aside.rename(start)
    assert not (tmp_path / "out").exists()


def settings_of(tiny: Tiny, **changed: object) -> None:
    with Store.open(tiny.store) as store:
        known = json.loads(store.run()["settings"])
        store.update_run(1, settings=json.dumps(known | changed))


def test_a_run_that_does_not_know_its_start_or_length_is_refused(
    copied: Tiny, tmp_path: Path
) -> None:
    arguments = exact(copied, tmp_path / "out", "p-07")
    settings_of(copied, epochs=3)
    assert "took 12 optimizer steps, but its settings make 18" in refused(*arguments)
    start = json.loads(Store.open(copied.store).run()["settings"])["start"]
    settings_of(copied, epochs=2, start=start | {"seed": 1})
    said = refused(*arguments)
    assert "a fresh model of its config and seed, whose weights are no longer the same" in said
    assert f"`pip install torch=={torch.__version__} transformers==" in said
    settings_of(copied, start=None)
    assert "the store does not know where it started from" in refused(*arguments)
    ordinary = ["forget", "p-07", "-s", copied.store, "--model", copied.model, "--out"]
    assert "--exact" not in run(*ordinary, tmp_path / "o", "--dose", 0.01, code=3).stderr


def test_other_versions_are_noted_and_threads_are_the_runs(
    copied: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = json.loads(Store.open(copied.store).run()["settings"])["environment"]
    settings_of(copied, environment=known | {"torch": "1.0", "threads": 2})
    used = []
    monkeypatch.setattr(
        "gradstore.training.replay.train", lambda *_, **__: used.append(torch.get_num_threads())
    )
    result = run(*exact(copied, tmp_path / "out", "p-07"), "--dry-run")
    assert "note: run-1 was trained with torch 1.0, this is " in result.stderr
    assert result.stderr.count("note:") == 1
    assert (used, torch.get_num_threads()) == ([2], 1)


def test_a_record_that_the_start_was_trained_on_too_is_refused(
    copied: Tiny, tmp_path: Path
) -> None:
    more = tmp_path / "more"
    data = write_jsonl(tmp_path / "more.jsonl", [*records(TRAINED, "p", 1)[:4],
                       {"id": "z-1", "text": "Ada is a baker."}])  # fmt: skip
    run("ingest", data, "-s", copied.store, "--model", copied.model, "--out", more,
        "--epochs", 1)  # fmt: skip
    tuned = replace(copied, model=more)
    said = refused(*exact(tuned, tmp_path / "out", "p-02"))
    assert "run-2 started from weights that run-1 had trained on 'p-02'" in said
    assert f"gradstore forget p-02 --exact --model {copied.model.resolve()} --out NEW" in said
    run(*exact(tuned, tmp_path / "out", "z-1"))
