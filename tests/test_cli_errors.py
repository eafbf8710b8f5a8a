"""What goes wrong is told in a sentence with the next step, and nothing is lost by it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import CONFIG, FAR, HELD_OUT, TRAINED, Tiny, counts, refused, run, run_json, write_jsonl

from gradstore.store import catalog
from gradstore.store.format import LATER

pytest_plugins = ["tiny"]
FRESH = ("--vocabulary", 400, "--epochs", 1)
HOLDER = """
import fcntl, os, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.truncate(0)
print(os.getpid(), file=file, flush=True)
print(flush=True)
sys.stdin.read()
"""


def forgetting(tiny: Tiny, out: Path, *ids: str, model: Path | None = None) -> list[object]:
    return ["forget", *(ids or ("p-07",)), "-s", tiny.store, "--model", model or tiny.model,
            "--out", out]  # fmt: skip


def ingesting(tiny: Tiny, out: Path, data: Path | None = None) -> list[object]:
    return ["ingest", data or tiny.data, "-s", tiny.store, "--model", tiny.model, "--out", out]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def unchanged(copied: Tiny, out: Path) -> Iterator[Tiny]:
    """A store in which a refused command may leave no trace; nor may it leave its output."""
    before = counts(copied.store)
    yield copied
    assert counts(copied.store) == before
    assert not out.exists()
    assert not list(out.parent.glob(".tmp*"))


@contextmanager
def held(path: Path) -> Iterator[int]:
    """Let another process hold a lock; gives its pid."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=pipe, stdout=pipe) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            yield other.pid
        finally:
            other.communicate()


# -- forget ------------------------------------------------------------------------------------


def test_ids_that_name_no_sample_or_several(unchanged: Tiny, out: Path) -> None:
    said = refused(*forgetting(unchanged, out, "nobody"))
    assert said == "no sample has the id 'nobody'; list them with `gradstore list`"
    said = refused(*forgetting(unchanged, out, "p-01", "p-1"))
    assert said == "'p-1' is the beginning of several ids (p-10, p-11, p-12, ...); give more"
    assert refused("show", "", "-s", unchanged.store).startswith("no sample has the id ''")
    assert "'h-01' has no gradient in run-1" in refused(*forgetting(unchanged, out, "h-01"))


def test_a_run_that_is_not_there(unchanged: Tiny, out: Path) -> None:
    said = refused(*forgetting(unchanged, out), "--run", "other")
    assert said == "the store has no run 'other'; it has: run-1"


def test_a_number_means_nothing_for_raw(unchanged: Tiny, out: Path) -> None:
    said = refused(*forgetting(unchanged, out), "--direction", "raw", "--dose", 0.5, code=2)
    assert said.endswith("give --dose target or --dose target:NATS")


def test_a_target_cannot_be_estimated_without_held_out_samples(tmp_path: Path, out: Path) -> None:
    rows = [{"id": i, "text": f"{i} is a baker"} for i in ("ada", "ben")]
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    store, model = tmp_path / "store", tmp_path / "model"
    run("init", store)
    run("ingest", data, "-s", store, "--config", config, *FRESH, "--out", model)
    arguments = ["forget", "ada", "-s", store, "--model", model, "--out", out]
    said = refused(*arguments, "--dose", "target")
    assert said.endswith("give --dose target:NATS, or ingest with --holdout")
    noted = run(*arguments, "--dose", 1)
    assert "note: no held-out samples in the store: the limit" in noted.stderr


@pytest.mark.parametrize("change", ["width", "vocabulary", "tokenizer"])
def test_a_model_that_is_not_the_stores(
    change: str, unchanged: Tiny, out: Path, tmp_path: Path
) -> None:
    model, store, config = (tmp_path / name for name in ("model", "other", "config.json"))
    config.write_text(json.dumps(CONFIG | ({"n_embd": 48} if change == "width" else {})))
    data, words = unchanged.data, ["--tokenizer", unchanged.model]
    if change == "vocabulary":
        words = ["--vocabulary", 380]
    elif change == "tokenizer":  # of other tokens, as many
        size = json.loads((unchanged.model / "config.json").read_text())["vocab_size"]
        words = ["--vocabulary", size]
        others = [{"id": n, "text": f"Zoë quizzed {n * 7919} vexing wizards."} for n in range(99)]
        data = write_jsonl(tmp_path / "others.jsonl", others)
    run("init", store)
    fresh = ["--config", config, *words, "--epochs", 1]
    run("ingest", data, "-s", store, *fresh, "--out", model)
    said = refused(*forgetting(unchanged, out, model=model))
    assert f"{model} is another model than the store's: {change} is " in said
    assert "Give the checkpoint that the stored run wrote (`gradstore runs`)" in said
    for more in ([], ["--dry-run"]):
        said = refused("ingest", data, "-s", unchanged.store, *fresh, "--out", out, *more)
        assert f"is another model than the store's: {change} is " in said


def test_a_folder_that_is_no_model(unchanged: Tiny, out: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent"):
        said = refused(*forgetting(unchanged, out, model=path))
        assert f"{path} is not a model that can be loaded" in said
        assert said.endswith(
            "Give a directory that save_pretrained wrote (safetensors), or a hub name."
        )


def test_a_model_whose_training_diverged(unchanged: Tiny, out: Path, tmp_path: Path) -> None:
    model = shutil.copytree(unchanged.model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["transformer.ln_f.weight"].fill_(float("nan"))
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    for dose in ("0.25", "target:3"):
        said = refused(*forgetting(unchanged, out, model=model), "--dose", dose)
        assert "is not a finite number" in said


def test_no_checkpoint_is_written_over(unchanged: Tiny, out: Path, tmp_path: Path) -> None:
    for existing in (unchanged.model, unchanged.config):
        for arguments in (forgetting(unchanged, existing), ingesting(unchanged, existing)):
            said = refused(*arguments)
            assert said.startswith(f"{existing} exists and is not empty")
            assert said.endswith("choose another --out")
    said = refused(*forgetting(unchanged, unchanged.config / "below"))
    assert said.startswith("cannot write ")


# -- stores ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["forget", "list", "show", "runs", "sql", "stats", "schema"])
def test_no_store_an_empty_one_and_one_of_the_future(
    command: str, trained: Tiny, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    arguments: list[object] = [command, *{"show": ["p-07"], "sql": ["SELECT 1"]}.get(command, [])]
    if command == "forget":
        arguments = forgetting(replace(trained, store=store), tmp_path / "out")
    else:
        arguments += ["-s", store]
    said = refused(*arguments)
    assert said == f"there is no store at {store}; create one with `gradstore init {store}`"
    run("init", store)
    said = refused(*arguments)
    assert said.endswith(f"holds nothing yet; fill it with `gradstore ingest --store {store} ...`")
    stated = json.loads((store / "gradstore.json").read_text())
    (store / "gradstore.json").write_text(json.dumps(stated | {"format": LATER + 1}))
    assert "Upgrade with `pip install --upgrade gradstore`" in refused(*arguments)
    (store / "gradstore.json").unlink()
    assert "there is no store" in refused(*arguments)


def test_init_takes_no_place_that_is_taken(unchanged: Tiny, tmp_path: Path) -> None:
    assert "already holds a store; choose another path" in refused("init", unchanged.store)
    assert "already holds something else" in refused("init", tmp_path)


def test_two_cannot_ingest_at_once(copied: Tiny, out: Path) -> None:
    with held(copied.store / "segments" / "r0" / "lock") as pid:
        said = refused(*ingesting(copied, out))
        assert said.startswith(f"another process (pid {pid}) is ingesting into")
        assert said.endswith("wait for it to finish, then run the same command again")
        assert len(run_json("list", "-s", copied.store)) == TRAINED + HELD_OUT
    assert not out.exists()
    run(*ingesting(copied, out), "--epochs", 1)


def test_whoever_finds_the_store_busy_leaves_no_run(copied: Tiny, out: Path) -> None:
    with held(copied.store / "segments" / "r0" / "lock"):
        refused(*ingesting(copied, out))
    assert len(run_json("runs", "-s", copied.store)) == 1


def test_a_request_that_cannot_be_recorded_writes_no_checkpoint(
    unchanged: Tiny, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "LOCK_SECONDS", 0.1)
    with held(unchanged.store / "catalog.lock") as pid:
        said = refused(*forgetting(unchanged, out), *FAR)
        assert said.startswith(f"another process (pid {pid}) is writing the catalog of")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here: {getattr(error, 'stderr', error)}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def leave(disk: Path, kilobytes: int) -> None:
    """Fill a disk until only so much is free."""
    (disk / "ballast").unlink(missing_ok=True)
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(b"\0" * (free - kilobytes * 1024))


def test_a_full_disk(trained: Tiny, small_disk: Path, out: Path) -> None:
    tiny = replace(trained, store=shutil.copytree(trained.store, small_disk / "store"))
    before = counts(tiny.store)
    for arguments in (forgetting(tiny, small_disk / "out"), ingesting(tiny, small_disk / "out")):
        leave(small_disk, 20)
        said = refused(*arguments)
        assert said.startswith("cannot write ")
        assert "No space left on device" in said
        assert said.endswith("free space or fix the permission, then run the same command again.")
        assert not (small_disk / "out").exists()
    (small_disk / "ballast").unlink()
    assert [row for row in counts(tiny.store) if row[0] != "runs"] == [
        row for row in before if row[0] != "runs"
    ]
    run(*forgetting(tiny, small_disk / "out"), *FAR)


# -- ingest ------------------------------------------------------------------------------------


def test_data_that_cannot_be_used(unchanged: Tiny, out: Path, tmp_path: Path) -> None:
    twice = write_jsonl(tmp_path / "twice.jsonl", [{"id": 1, "text": "a b"}] * 2)
    assert "line 2: the id '1' occurs twice" in refused(*ingesting(unchanged, out, twice))
    long = write_jsonl(tmp_path / "long.jsonl", [{"id": "x", "text": "Ada is a baker. " * 30}])
    said = refused(*ingesting(unchanged, out, long))
    assert said.startswith("sample 'x' has ")
    assert "tokens, 64 fit; split it, raise --max-length" in said
    said = refused(*ingesting(unchanged, out), "--holdout", unchanged.data)
    assert said.startswith("'p-01' is in the training data and in the held-out data")
    assert "there is no file" in refused(*ingesting(unchanged, out, tmp_path / "absent.jsonl"))


def test_divergence_keeps_what_was_captured_before(copied: Tiny, out: Path) -> None:
    said = refused(*ingesting(copied, out), "--lr", 1e30, "--max-grad-norm", 0)
    assert "is NaN: training has diverged. Lower the learning rate" in said
    assert said.endswith("what was captured before this step is kept")
    [failed] = run_json("runs", "-s", copied.store)[1:]
    assert (failed["status"], failed["what"]) == ("failed", "8 gradients, epochs first")
    query = "SELECT count(*) AS n FROM gradients WHERE run_id = 2 AND isfinite(loss) AND step = 1"
    assert run_json("sql", query, "-s", copied.store) == [{"n": 8}]
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "is not a model config (JSON with a model_type)"),
        ("{", "is not a model config (JSON with a model_type)"),
        ('{"n_embd": 8}', "is not a model config (JSON with a model_type)"),
        ('{"model_type": "gpt9"}', "describes no model: Unrecognized model identifier: gpt9."),
        ('{"model_type": "gpt2", "n_embd": 33, "n_head": 2}', "describes no model: `embed_dim`"),
        ('{"model_type": "gpt2", "n_embd": "x"}', "Field 'n_embd' expected int, got str"),
        ('{"model_type": "t5"}', "describes no model: Unrecognized configuration class"),
    ],
)
def test_configs_of_no_model(text: str, said: str, unchanged: Tiny, out: Path) -> None:
    config = out.with_name("config.json")
    config.write_text(text)
    arguments = ["ingest", unchanged.data, "-s", unchanged.store, "--out", out, *FRESH]
    error = refused(*arguments, "--config", config)
    assert error.startswith(str(config))
    assert said in error


# -- usage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "a", "--config", "b"], "give either --model or --config"),
        ([], "give either --model or --config"),
        (["--config", "b"], "a fresh model needs either --tokenizer or --vocabulary"),
        (["--model", "a", "--vocabulary", "400"], "a model has its own"),
        (["--model", "a", "--epochs-captured", "every"], "'every' names no epochs; expected first"),
        (["--model", "a", "--epochs-captured", "0"], "'0' names no epochs"),
        (["--model", "a", "--lr", "-1"], "'--learning-rate'"),
        (["--model", "a", "--lr", "0"], "'--learning-rate'"),
        (["--model", "a", "--schedule", "zigzag"], "'zigzag' is not one of 'linear'"),
        (["--model", "a", "--epochs", "0"], "'--epochs'"),
    ],
)
def test_ingest_refuses_bad_options_as_usage(
    options: list[str], said: str, unchanged: Tiny, out: Path
) -> None:
    error = refused("ingest", unchanged.data, "-s", unchanged.store, "--out", out, *options, code=2)
    assert said in error


@pytest.mark.parametrize("dose", ["0", "-1", "nan", "inf", "much", "target:", "target:x"])
def test_forget_refuses_bad_doses_as_usage(dose: str, unchanged: Tiny, out: Path) -> None:
    said = refused(*forgetting(unchanged, out), "--dose", dose, code=2)
    assert said.endswith("is no dose; expected a positive number, target, or target:NATS")


def test_a_store_must_be_named() -> None:
    assert "Missing option '-s' / '--store'" in refused("list", code=2)
    assert "GRADSTORE_STORE" in run("list", code=2).stderr


# -- sql ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query",
    [
        "SELEC 1",
        "SELECT nothing FROM samples",
        "SELECT 1; DROP TABLE samples",
        "DELETE FROM samples",
        "INSERT INTO migrations SELECT * FROM migrations",
        "CREATE TABLE mine (x INTEGER)",
        "COPY samples TO '{folder}/x.csv'",
        "EXPORT DATABASE '{folder}/x'",
        "ATTACH '{folder}/x.duckdb'",
        "SELECT * FROM read_csv('{folder}/config.json')",
        "SELECT * FROM read_text('{folder}/config.json')",
        "SELECT * FROM '{folder}/config.json'",
        "SET enable_external_access = true",
        "INSTALL httpfs",
    ],
)
def test_sql_that_is_wrong_writes_or_reads_files(
    query: str, unchanged: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    error = run("sql", query.format(folder=tmp_path), "-s", unchanged.store, code=1)
    assert error.stdout == ""
    assert error.stderr.startswith("Error: ")
    assert error.stderr.endswith("(`gradstore schema` lists tables and columns)\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_schema_of_a_table_that_is_not_there(unchanged: Tiny) -> None:
    said = refused("schema", "persons", "-s", unchanged.store)
    assert said == "the catalog has no table 'persons'; `gradstore schema` lists them"


@pytest.mark.parametrize("query", ["", "-- only a comment", "SELECT now()"])
def test_sql_without_rows_that_python_can_hold(query: str, unchanged: Tiny) -> None:
    result = run("sql", "-", "-s", unchanged.store, stdin=query, code=int("now" not in query))
    assert len(result.stderr.splitlines()) <= 1
