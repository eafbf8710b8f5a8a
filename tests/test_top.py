"""``gradstore top`` names the records that shaped an output, by every method."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from models import batch_of, samples, sgd, tiny
from records import RUN, VOCABULARY, WIDTH
from test_influence import dumb
from tiny import FRESH, TRAINED, Tiny, counts, files, refused, run, run_json, write_jsonl
from tiny import records as people

import gradstore
from gradstore import Store
from gradstore.errors import InfluenceError, ModelError, SettingsError
from gradstore.influence.activation import activations
from gradstore.influence.device import device_of, room_on
from gradstore.influence.query import Checkpoint, Query, of_sample
from gradstore.influence.solved import by_fisher, by_products
from gradstore.influence.top import Settings, influences
from gradstore.store import ModelIdentity, catalog
from gradstore.training.model import load_model, load_tokenizer

pytest_plugins = ["tiny"]
MODEL = ModelIdentity("GPT2LMHeadModel", VOCABULARY, WIDTH, WIDTH, 64, True)
SHAPE = (VOCABULARY, WIDTH)
ASKED = "Ada is a baker, born in 1966"


def test_top_names_the_records_and_keeps_their_scores(copied: Tiny) -> None:
    rows = run_json("top", "--id", "p-03", "-s", copied.store, "-k", 5)
    store = Store.open(copied.store)
    truth = dumb(store, of_sample(store, store.run(), "p-03"))
    names = dict(store.rows("SELECT id, sample_id FROM samples"))
    del truth[names["p-03"]]
    expected = sorted(truth, key=truth.__getitem__, reverse=True)
    assert [names[row["id"]] for row in rows] == expected[:5]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0]["score"] == pytest.approx(truth[expected[0]], rel=1e-3)
    columns, kept = store.query(
        "SELECT id, rank, score, method, query FROM influential ORDER BY rank LIMIT 5"
    )
    assert [dict(zip(columns, row, strict=True)) for row in kept] == [
        row | {"method": "dot", "query": "id:p-03"} for row in rows
    ]
    assert store.rows("SELECT count(*), any_value(model_digest) FROM influential "
                      "JOIN influence_runs USING (influence_id)") == [(23, None)]  # fmt: skip
    lowest = run_json("top", "--id", "p-03", "-s", copied.store, "-k", 1, "--bottom", "--dry-run")
    assert names[lowest[0]["id"]] == expected[-1]
    assert lowest[0]["rank"] == 23
    own = run_json("top", "--id", "p-03", "-s", copied.store, "--with-self", "--dry-run", "-k", 24)
    assert "p-03" in {row["id"] for row in own}
    assert store.rows("SELECT count(*) FROM influence_runs") == [(1,)]


def test_top_tells_which_tokens_make_a_score(trained: Tiny) -> None:
    found = run_json(
        "top", "--prompt", "Ada is a baker, born", "--completion", " in 1966", "-s",
        trained.store, "-k", 2, "--tokens", "--dry-run", "--adam",
    )  # fmt: skip
    for row in found["influences"]:
        parts = [part for part in found["tokens"] if part["id"] == row["id"]]
        assert sum(part["score"] for part in parts) == pytest.approx(row["score"], rel=1e-4)
        assert [part["next"] for part in parts[:-1]] == [part["read"] for part in parts[1:]]
    side = run_json(
        "top", "--text", "Ada is a baker", "-s", trained.store, "-k", 1, "--tokens", "--side",
        "input", "--dry-run",
    )  # fmt: skip
    assert {part["output"] for part in side["tokens"]} == {0}


def test_top_multiplies_on_a_device(trained: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("top", "--id", "p-03", "-s", trained.store, "-k", 3, "--dry-run")
    with monkeypatch.context() as patched:
        patched.setattr("torch.cuda.is_available", lambda: False)
        assert device_of(None) == "cpu"
        assert run_json(*asked, "--device", "cpu") == run_json(*asked)
        patched.setattr("torch.cuda.is_available", lambda: True)
        assert device_of(None) == "cuda"
        patched.setattr("torch.cuda.device_count", lambda: 2)
        assert [device_of(each) for each in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
        told = run(*asked, "--device", "cuda:2", code=2).stderr
        assert "--device cuda:2 is not on this machine" in told
        assert "expected cpu or cuda:0 or cuda:1" in told
        patched.setattr("torch.cuda.device_count", lambda: 0)
        for missing in ("abacus", "cuda", "meta"):
            told = run(*asked, "--device", missing, code=2).stderr
            assert f"--device {missing} is not on this machine" in told
            assert told.rstrip().endswith("expected cpu")
    full = "cuda has too little memory free: give --device cpu"
    with pytest.raises(InfluenceError, match=full), room_on("cuda"):
        raise torch.OutOfMemoryError


def test_an_executor_multiplies_on_its_own_processors(trained: Tiny) -> None:
    store = Store.open(trained.store)
    asked = of_sample(store, store.run(), "p-03")

    def elsewhere(function: Any, *columns: Any) -> Any:
        return map(function, *columns)

    with pytest.raises(SettingsError, match="not on cuda: leave --device out, or --executor"):
        influences(store, [asked], Settings(device="cuda"), executor=elsewhere)


def test_top_says_when_the_processor_has_no_bfloat16(
    copied: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (
        "top", "--prompt", "Ada is", "--completion", " a baker", "-s", copied.store, "-k", 3,
        "--device", "cpu",
    )  # fmt: skip
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
    swift = run(*asked, "--json")
    assert "processor" not in swift.stderr
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    slow = run(*asked, "--json")
    assert "this processor does not multiply bfloat16 itself" in slow.stderr
    told = run(*asked, "--json", "--precision", "float32")
    assert "processor" not in told.stderr
    assert json.loads(told.stdout) == json.loads(slow.stdout) != json.loads(swift.stdout)
    kept = Store.open(copied.store).rows(
        "SELECT settings FROM influence_runs ORDER BY influence_id"
    )
    assert [json.loads(of)["precision"] for (of,) in kept] == ["bfloat16", "float32", "float32"]


def test_top_asks_about_held_out_samples_and_what_the_model_says(trained: Tiny) -> None:
    common = ("-s", trained.store, "--dry-run", "-k", 1)
    assert "--model" in refused("top", "--id", "h-01", *common)
    [held_out] = run_json("top", "--id", "h-01", "--model", trained.model, *common)
    assert held_out["id"].startswith("p-")
    said = run("top", "--prompt", "Ada is", "--new-tokens", 3, *common)
    assert "the model goes on: " in said.stderr
    assert run_json("top", "--method", "self", *common)[0]["score"] > 0
    before = counts(trained.store)
    assert "allow" in refused("top", "--id", "p-01", "--memory", "10KB", *common)
    assert counts(trained.store) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "takes one of --id, --text or --prompt"),
        (["--id", "p-01", "--text", "a"], "given: --id --text"),
        (["--method", "self", "--id", "p-01"], "takes no query"),
        (["--completion", "a", "--id", "p-01"], "comes after a --prompt"),
        (["--id", "p-01", "--tokens", "--method", "cosine"], "cosine is no sum over --tokens"),
        (["--method", "self", "--tokens"], "self is no sum over --tokens"),
        (["--id", "p-01", "--adam", "--method", "cosine"], "belongs to --method dot"),
        (["--id", "p-01", "--adam", "--method", "hvp"], "belongs to --method dot"),
        (["--id", "p-01", "--damping", "1"], "--damping belongs to --method hvp"),
        (["--id", "p-01", "--solver", "cg", "--method", "newton"], "--solver belongs to"),
        (["--id", "p-01", "--coarse", "20", "--method", "newton"], "by dot or cosine"),
        (["--id", "p-01", "--side", "input", "--method", "hvp"], "leave --side input out"),
        (["--prompt", "Ada", "--method", "activation"], "give --id or --text"),
        (["--prompt", "Ada", "--completion", "a", "--method", "activation"], "a whole text"),
        (["--prompt", "Ada", "--completion", ""], "--completion is empty"),
        (["--completion", "", "--text", "a"], "comes after a --prompt"),
        (["--id", "", "--text", ""], "given: --id --text"),
        (["--method", "self", "--text", ""], "takes no query"),
        (["--id", "p-01", "--memory", "much"], "is no size"),
        (["--id", "p-01", "--epochs", "none"], "names no epochs"),
    ],
)
def test_top_explains_what_it_takes(trained: Tiny, arguments: list[str], said: str) -> None:
    assert said in refused("top", *arguments, "-s", trained.store, code=2)


@pytest.mark.parametrize("method", ["hvp", "newton"])
def test_top_bends_the_query_and_keeps_how(copied: Tiny, method: str) -> None:
    made = run("top", "--text", ASKED, "-s", copied.store, "--method", method, "-k", 24, "--json")
    store, checkpoint = Store.open(copied.store), Checkpoint(Store.open(copied.store), copied.model)
    plain = checkpoint.of_tokens(checkpoint.tokens(ASKED))
    if method == "hvp":
        query = by_products(store, store.run(), plain, checkpoint.network)
        assert query.bent is not None
        assert 0 < query.bent.residual <= 0.05
        left = f"{100 * query.bent.residual:.2g} % of the query"
        assert f"conjugate gradients left {left}" in made.stderr
    else:
        query = by_fisher(store, store.run(), plain)
    assert query.bent is not None
    assert f"λ {query.bent.damping:.3g}" in made.stderr
    x = query.gradients[None].dense()
    scores = {
        id: sum(
            one.exposure.learning_rate * one.exposure.batch_share * one.exposure.grad_scale
            * one.gradient(store.model).along(x)
            for one in store.records([number], 1)
        )
        for id, number in store.rows("SELECT id, sample_id FROM samples WHERE split = 'train'")
    }  # fmt: skip
    rows = json.loads(made.stdout)
    assert [row["id"] for row in rows] == sorted(scores, key=scores.__getitem__, reverse=True)
    scale = max(map(abs, scores.values()))
    assert [row["score"] for row in rows] == pytest.approx(
        [scores[row["id"]] for row in rows], abs=1e-4 * scale
    )
    [(kept, digest, text)] = store.rows("SELECT method, model_digest, settings FROM influence_runs")
    settings = json.loads(text)
    assert (kept, digest) == (method, plain.model_digest)
    bent = asdict(query.bent)
    assert settings["damping"] == pytest.approx(bent.pop("damping"), rel=1e-3)
    assert settings["residual"] == pytest.approx(bent.pop("residual"), rel=1e-2)
    assert bent.items() <= settings.items()
    if method == "hvp":
        run("top", "--text", ASKED, "-s", copied.store, "--method", method, "--solver", "lissa",
            "--curvature", "hessian", "--damping", 50)  # fmt: skip
        [(text,)] = Store.open(copied.store).rows(
            "SELECT settings FROM influence_runs WHERE influence_id = 2"
        )
        other = json.loads(text)
        assert (other["solver"], other["curvature"], other["damping"]) == ("lissa", "hessian", 50)
        assert other["records"] == 24
    with pytest.raises(InfluenceError, match=f"made for --method dot, not for {method}"):
        influences(store, [plain], Settings(method))  # type: ignore[arg-type]
    with pytest.raises(InfluenceError, match=f"made for --method {method}, not for cosine"):
        influences(store, [query], Settings("cosine"))
    with pytest.raises(SettingsError, match="--side input out"):
        influences(store, [query], Settings(method, sides="input"))  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="leave --coarse out"):
        influences(store, [query], Settings(method, coarse=5))  # type: ignore[arg-type]


def test_a_record_that_is_odd_comes_out_on_top_by_itself(tmp_path: Path) -> None:
    """Its words are those of the others, in another order."""
    odd = files(tmp_path)
    rows = people(TRAINED, "p", 1)
    words = rows[12]["text"].split()
    Random(3).shuffle(words)
    rows[12]["text"] = " ".join(words)
    write_jsonl(odd.data, rows)
    run("init", odd.store)
    run("ingest", odd.data, "-s", odd.store, "--config", odd.config, *FRESH,
        "--epochs", 4, "--out", odd.model)  # fmt: skip
    asked = ("top", "--method", "self", "-s", odd.store, "--epochs", 4)
    found = run_json(*asked, "-k", 24)
    assert found[0]["id"] == "p-13"  # by then the others are learned
    assert found[0]["norm"] == max(row["norm"] for row in found)
    assert run(*asked, "--dry-run").stdout.split()[:4] == ["rank", "id", "score", "norm"]
    assert "the norm of a record of" in refused(*asked, "--memory", "1kB")


def test_top_by_activations_multiplies_gradients_with_hidden_states(trained: Tiny) -> None:
    asked = ("-s", trained.store, "--method", "activation", "--dry-run", "-k", 24, "--precision",
             "float32")  # fmt: skip
    rows = run_json("top", "--id", "h-02", *asked)
    store, network = Store.open(trained.store), load_model(trained.model).eval()
    number = store.resolve(["h-02"])["h-02"]
    tokens = store.tokens([number], 1)[number].long()
    hidden = network.transformer(tokens[None]).last_hidden_state[0, :-1].detach()
    scores: dict[str, float] = {}
    for id, of in store.rows("SELECT id, sample_id FROM samples WHERE split = 'train'"):
        for one in store.records([of], 1):
            e, dense = one.exposure, one.gradient(store.model).dense()
            mean = (hidden * dense[tokens[1:]]).sum(1).mean()
            step = e.learning_rate * e.batch_share * e.grad_scale
            scores[id] = scores.get(id, 0.0) - step * float(mean)
    assert [row["id"] for row in rows] == sorted(scores, key=scores.__getitem__, reverse=True)
    assert [row["score"] for row in rows] == pytest.approx(
        [scores[row["id"]] for row in rows], rel=1e-3, abs=1e-6
    )
    assert run_json("top", "--text", ASKED, *asked) != rows
    same = ("-s", trained.store, "--method", "activation-dot", *asked[4:])
    assert run_json("top", "--id", "h-02", *same) == rows


@pytest.mark.parametrize("method", ["hvp", "newton", "activation"])
def test_tokens_make_up_the_scores_of_other_sums_too(trained: Tiny, method: str) -> None:
    found = run_json(
        "top", "--id", "p-03", "-s", trained.store, "--method", method, "--tokens", "-k", 2,
        "--dry-run",
    )  # fmt: skip
    for row in found["influences"]:
        parts = [part["score"] for part in found["tokens"] if part["id"] == row["id"]]
        assert sum(parts) == pytest.approx(row["score"], rel=1e-3)


def test_top_solves_for_captured_layers_too(tmp_path: Path, trained: Tiny) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    run("init", store)
    run(
        "ingest", trained.data, "-s", store, "--model", trained.model, "--layers", "*.c_fc",
        "--epochs", 1, "--out", out,
    )  # fmt: skip
    asked = ("top", "--text", ASKED, "-s", store, "--method", "hvp", "-k", 24)
    rows = run_json(*asked, "--layers", "blocks")
    assert len(rows) == 24
    assert rows != run_json(*asked)
    [settings] = Store.open(store).rows(
        "SELECT settings FROM influence_runs ORDER BY influence_id LIMIT 1"
    )
    assert json.loads(settings[0])["layers"] == [f"transformer.h.{n}.mlp.c_fc" for n in (0, 1)]
    assert "no layer 'elsewhere'" in refused(*asked, "--layers", "elsewhere")
    assert "position is no linear layer" in refused(*asked, "--layers", "position", code=2)
    for wrong in (("--tokens",), ("--method", "dot")):
        assert "--layers belong to --method hvp" in refused(
            *asked, "--layers", "blocks", *wrong, code=2
        )


def test_activations_need_gradients_of_a_tied_head(store: Store) -> None:
    model, tokens = tiny(tied=False), samples(4)
    with gradstore.capture(model, store, sgd(model), **RUN) as recorder:
        model(**batch_of(tokens)).loss.backward()
        recorder._optimizer.step()
    asked = Query("asked", {None: activations(model, list(tokens.values()))}, None, "activation")
    with pytest.raises(InfluenceError, match="has an untied head; give another --method"):
        influences(store, [asked], Settings("activation"))


def test_only_texts_need_the_checkpoints_tokenizer(trained: Tiny, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(trained.model / name, bare)
    asked = ("-s", trained.store, "--model", bare, "--dry-run", "-k", 3)
    assert len(run_json("top", "--id", "h-01", *asked)) == 3
    assert "than the store's: tokenizer is" in refused("top", "--text", ASKED, *asked)
    with pytest.raises(ModelError, match="holds no tokenizer: .* Give a directory that"):
        load_tokenizer(tmp_path)


def test_what_has_no_tokens_is_no_query(copied: Tiny) -> None:
    common = ("-s", copied.store, "--dry-run")
    assert "of 0 tokens none" in refused("top", "--text", "", *common)
    assert "of 0 tokens none" in refused("top", "--text", "", "--method", "activation", *common)
    assert "an empty prompt" in refused("top", "--prompt", "", *common)
    stray: dict[str, list[Any]] = {
        "sample_id": [99], "id": ["z"], "id_hash": [catalog.hash_of("z")], "split": ["train"],
        "tokens": [5], "added_at": [catalog.now()],
    }  # fmt: skip
    with Store.open(copied.store) as store, store.transaction() as connection:
        catalog.insert(connection, "samples", stray)
    said = refused("top", "--id", "z", "--method", "newton", *common)
    assert said == "'z' is not among the samples of run-1; give its --text"
