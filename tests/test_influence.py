"""Influence scans: products from factors are those of dense matrices, and what they foretell."""

import json
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import KINDS, alone, batch_of, samples, sgd, snapshot, tiny
from records import KEPT, RUN, VOCABULARY, WIDTH, record, tail
from tiny import Tiny, counts, refused, run, run_json
from torch import Tensor

import gradstore
from gradstore import FactoredGradient, Store
from gradstore.capture.taps import embedding_of
from gradstore.errors import IdError, InfluenceError, ModelError
from gradstore.evaluate.extraction import Secret, completion
from gradstore.evaluate.loss import log_likelihoods
from gradstore.factored import Term
from gradstore.influence.activation import activations
from gradstore.influence.query import Checkpoint, Query, continued, gradient_of, of_sample
from gradstore.influence.scan import (
    Place,
    contributions,
    lenses,
    norms_segment,
    score_segment,
)
from gradstore.influence.solved import by_fisher, by_products
from gradstore.influence.top import Settings, influences, record_scores, tokens_of
from gradstore.store import ModelIdentity, catalog
from gradstore.store.record import Record
from gradstore.store.segment import pack, write_segment
from gradstore.training.model import load_model, load_tokenizer

pytest_plugins = ["tiny"]
MODEL = ModelIdentity("GPT2LMHeadModel", VOCABULARY, WIDTH, WIDTH, 64, True)
SHAPE = (VOCABULARY, WIDTH)
ASKED = "Ada is a baker, born in 1966"


# -- a segment ---------------------------------------------------------------------------------


def segment(folder: Path, met: list[Record], profile: str = "raw") -> tuple[Path, list[Place]]:
    """Records written as one segment, and where each lies in it."""
    arrays, tables = pack(met)
    path = write_segment(
        folder, run=RUN | {"run_id": 1}, kind="gradients", profile=profile, arrays=arrays,
        tables=tables,
    )  # fmt: skip
    columns = (tables["exposures"][name] for name in Place._fields)
    return path, [Place(*row) for row in zip(*columns, strict=True)]


def met(count: int = 12) -> list[Record]:
    """Records of several lengths whose micro-batches have tails of their own, rounded nowhere."""
    tails = [tail(f"tail-{n}") for n in range(3)]
    return [
        record(f"s-{n}", rows=1 + 5 * n, dtype=torch.float32, tail=tails[n // 4])
        for n in range(count)
    ]


def query(rank: int, seed: int = 0) -> FactoredGradient:
    draw = torch.Generator().manual_seed(seed)
    half = rank // 2
    return FactoredGradient(
        [
            Term.one_hot(
                torch.randint(VOCABULARY, (half,), generator=draw),
                torch.randn(half, WIDTH, generator=draw),
            ),
            Term(
                None,
                torch.randn(rank - half, VOCABULARY, generator=draw),
                torch.randn(rank - half, WIDTH, generator=draw),
            ),
        ],
        SHAPE,
    )


def close(found: Tensor, expected: list[float], tolerance: float = 1e-4) -> bool:
    wanted = torch.tensor(expected, dtype=torch.float64)
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


@pytest.mark.parametrize("profile", ["raw", "packed"])
@pytest.mark.parametrize("rank", [2, 6, 40])
def test_a_scan_gives_the_factored_dot_of_every_record(
    tmp_path: Path, rank: int, profile: str
) -> None:
    records, asked = met(), query(rank)
    path, places = segment(tmp_path, records, profile)
    [lens] = lenses([asked])
    assert (lens.right is None) == (2 * rank > WIDTH)
    found = score_segment(path, places, [lens])
    assert close(found[:, 0], [r.gradient(MODEL).dot(asked) for r in records])
    side = score_segment(path, places, [lens], "input")
    assert close(side[:, 0], [r.gradient(MODEL, sides="input").dot(asked) for r in records])


def test_a_scan_in_little_memory_and_in_any_order_is_the_same(tmp_path: Path) -> None:
    path, places = segment(tmp_path, met())
    through = list(lenses([query(6)]))
    whole = score_segment(path, places, through)
    row = 16 * WIDTH + 16 * 6 + 20 * (KEPT + 1)
    little = through[0].nbytes + 17 * row  # records have up to 56 rows: they are cut
    assert torch.allclose(score_segment(path, places, through, memory=little), whole)
    some = [7, 2, 11, 3]
    assert torch.allclose(
        score_segment(path, [places[n] for n in some], through), whole[torch.tensor(some)]
    )
    assert score_segment(path, [], through).shape == (0, 1)
    with pytest.raises(InfluenceError, match=r"allow \d+ MB \(--memory\)"):
        score_segment(path, places, through, memory=through[0].nbytes)


def test_many_queries_at_once_are_as_many_scans(tmp_path: Path) -> None:
    path, places = segment(tmp_path, met())
    asked = [query(rank, seed) for seed, rank in enumerate([2, 6, 40, 4, 2] + [8] * 40)]
    through = list(lenses(asked))
    assert [len(lens.ranks) for lens in through] == [
        2,
        1,
        33,
        9,
    ]  # 4 + 2 + 31 · 8 columns fit into 256
    found = score_segment(path, places, through)
    alone = [score_segment(path, places, list(lenses([one])))[:, 0] for one in asked]
    assert torch.allclose(found, torch.stack(alone, dim=1), rtol=1e-4, atol=1e-4)


def test_a_scan_is_a_pure_function_that_can_be_sent_away(tmp_path: Path) -> None:
    path, places = segment(tmp_path, met())
    task = partial(score_segment, through=list(lenses([query(6)])))
    sent = pickle.loads(pickle.dumps(task))
    assert torch.equal(sent(path, places), task(path, places))


def test_a_records_tokens_add_up_to_its_score(tmp_path: Path) -> None:
    records, asked = met(), query(6)
    path, places = segment(tmp_path, records)
    [lens] = lenses([asked])
    parts = contributions(path, places[9], lens)
    assert parts.shape == (46, 2)
    assert close(parts.sum()[None], [records[9].gradient(MODEL).dot(asked)])
    read = records[9].gradient(MODEL, sides="input").dot(asked)
    assert close(parts[:, 0].sum()[None], [read])
    last = Term.one_hot(records[9].tokens[45:46], records[9].D[45:])
    assert close(parts[45:, 0], [FactoredGradient([last], SHAPE).dot(asked)])


def test_a_divisor_divides_every_entry_of_the_query(tmp_path: Path) -> None:
    records, asked = met(), query(4)
    path, places = segment(tmp_path, records)
    divisor = torch.rand(SHAPE) + 0.5
    found = score_segment(path, places, list(lenses([asked], divisor)))
    divided = asked.dense() / divisor
    assert close(found[:, 0], [float((r.gradient(MODEL).dense() * divided).sum()) for r in records])


def test_norms_are_those_of_the_dense_gradients(tmp_path: Path) -> None:
    records = met()
    path, places = segment(tmp_path, records)
    exact = [float(r.gradient(MODEL).dense().double().norm()) for r in records]
    assert close(norms_segment(path, places), exact, 1e-6)
    side = [float(r.gradient(MODEL, sides="input").dense().double().norm()) for r in records]
    assert close(norms_segment(path, places, "input"), side, 1e-6)


@given(st.integers(1, 9), st.integers(1, 9), st.floats(-4, 4))
def test_lenses_are_linear_in_the_query(rank: int, other: int, factor: float) -> None:
    a, b = query(rank, 1), query(other, 2)
    [lens] = lenses([a + b * factor])
    held = lens.left if lens.right is None else lens.left @ lens.right
    assert torch.allclose(held, a.dense() + factor * b.dense(), atol=1e-4)


# -- a query -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_querys_gradient_is_autograds(kind: str, tied: bool) -> None:
    model, [tokens] = tiny(kind, tied=tied), samples(1, 3).values()
    truth = alone(tiny(kind, tied=tied), snapshot(model), tokens).gradients
    found = gradient_of(model.train(), tokens)
    assert model.training
    assert torch.allclose(found.dense(), truth["embedding"], atol=1e-5)
    side = gradient_of(model, tokens, sides="input").dense()
    assert torch.allclose(side, truth["input" if tied else "embedding"], atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_completions_gradient_is_of_its_tokens_alone() -> None:
    model, tokens = tiny(), torch.arange(2, 12)
    loss = -log_likelihoods(model.eval(), [tokens])[0] + log_likelihoods(model, [tokens[:7]])[0]
    [truth] = torch.autograd.grad(loss, embedding_of(model).weight)
    found = gradient_of(model, tokens, 7)
    assert sum(len(term.B) for term in found.terms) == 9 + 3
    assert torch.allclose(found.dense(), truth, atol=1e-5)


def test_a_query_without_a_prediction_or_a_gradient_is_refused() -> None:
    model = tiny()
    with pytest.raises(InfluenceError, match="of 1 tokens none from number 1 on"):
        gradient_of(model, torch.tensor([3]))
    embedding_of(model).weight.requires_grad_(False)
    with pytest.raises(ModelError, match="requires_grad_"):
        gradient_of(model, torch.tensor([3, 4]))


def test_what_a_model_says_is_what_greedy_decoding_gives(trained: Tiny) -> None:
    network, tokenizer = load_model(trained.model), load_tokenizer(trained.model)
    prompt = "Ada is a baker, born"
    start = torch.tensor(tokenizer(prompt)["input_ids"])
    longer = continued(network, start, 5)
    assert len(longer) == len(start) + 5
    said = tokenizer.decode(longer[len(start) :]).strip()
    assert said == completion(network, tokenizer, Secret(prompt, " in 1966; phone"))[: len(said)]
    stopped = continued(network, start, 5, end=int(longer[len(start)]))
    assert torch.equal(stopped, longer[: len(start) + 1])
    assert len(continued(network, start, 999)) == 64  # all that the model can read
    asked, text = Checkpoint(Store.open(trained.store), trained.model).of_output(prompt, 5)
    assert text.strip() == said
    truth = gradient_of(network, longer, len(start))
    assert torch.allclose(asked.gradients[None].dense(), truth.dense(), atol=1e-6)


# -- a store -----------------------------------------------------------------------------------


def dumb(
    store: Store, asked: Query, epochs: tuple[int, ...] = (1, 2), method: str = "dot"
) -> dict[int, float]:
    """Scores by dense matrices, one record at a time."""
    numbers = [n for (n,) in store.rows("SELECT sample_id FROM samples WHERE split = 'train'")]
    scores: dict[int, float] = {}
    for number in numbers:
        found = []
        for one in store.records([number], 1):
            if (
                gradient := asked.at(one.exposure.epoch)
            ) is None or one.exposure.epoch not in epochs:
                continue
            own, other = one.gradient(store.model).dense(), gradient.dense()
            product, e = float((own * other).sum()), one.exposure
            if method == "cosine":
                found.append(product / float(own.norm() * other.norm()))
            else:
                found.append(product * e.learning_rate * e.batch_share * e.grad_scale)
        scores[number] = sum(found) / (len(found) if method == "cosine" else 1)
    return scores


@pytest.mark.parametrize(("method", "epochs"), [("dot", (1, 2)), ("dot", (2,)), ("cosine", (1, 2))])
def test_scores_are_those_of_the_dumb_loop(
    trained: Tiny, method: str, epochs: tuple[int, ...]
) -> None:
    store = Store.open(trained.store)
    asked = [
        of_sample(store, store.run(), "p-03"),
        Checkpoint(store, trained.model).of_completion("Ada is a baker, born", " in 1966"),
    ]
    settings = Settings(method, epochs=",".join(map(str, epochs)))  # type: ignore[arg-type]
    for found, one in zip(influences(store, asked, settings), asked, strict=True):
        truth = dumb(store, one, epochs, method)
        assert found.sample_ids == sorted(truth, key=truth.__getitem__, reverse=True)
        assert found.values == pytest.approx([truth[n] for n in found.sample_ids], rel=1e-3)


def test_a_record_acts_on_itself_by_its_squared_norm(trained: Tiny) -> None:
    store = Store.open(trained.store)
    [found] = influences(store, [], Settings("self"))
    scores = dict(zip(found.sample_ids, found.values, strict=True))
    for name in ("p-03", "p-20"):
        number = store.resolve([name])[name]
        own = dumb(store, of_sample(store, store.run(), name))[number]
        assert scores[number] == pytest.approx(own, rel=1e-4)
    assert found.values == sorted(found.values, reverse=True)


def test_adam_divides_by_its_second_moments(trained: Tiny) -> None:
    store = Store.open(trained.store)
    facts, asked = store.run(), of_sample(store, store.run(), "p-03")
    kept = store.moments(1, "embedding", "end")
    assert kept is not None
    root = (kept[0] / (1 - facts["beta2"] ** kept[1])).sqrt() + facts["epsilon"]
    dense = {epoch: g.dense() / root for epoch, g in asked.gradients.items()}
    rows = torch.arange(root.shape[0])
    divided = Query(
        "divided",
        {e: FactoredGradient([Term.one_hot(rows, q)], tuple(q.shape)) for e, q in dense.items()},
    )
    truth = dumb(store, divided)
    [found] = influences(store, [asked], Settings(adam=True))
    assert found.values == pytest.approx([truth[n] for n in found.sample_ids], rel=1e-3)
    number = found.sample_ids[0]
    parts = tokens_of(store, found, number)
    assert float(parts.sum()) == pytest.approx(found.values[0], rel=1e-4)
    with pytest.raises(InfluenceError, match="--adam weighs"):
        influences(store, [asked], Settings("cosine", adam=True))


@pytest.mark.parametrize("tied", [True, False])
def test_scores_foretell_what_a_step_does_to_the_querys_loss(store: Store, tied: bool) -> None:
    model, tokens = tiny(tied=tied), samples(6, 1)
    [asked] = samples(1, 99).values()
    weight = embedding_of(model).weight
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    before = Query("asked", {None: gradient_of(model, asked)})
    known = log_likelihoods(model, [asked]).detach()
    with gradstore.capture(model, store, optimizer, sides="both", top_k=149):
        model(**batch_of(tokens)).loss.backward()
        optimizer.step()
    fallen = float(log_likelihoods(model, [asked]).detach() - known)
    [found] = influences(store, [before])
    assert sum(found.values) == pytest.approx(fallen, rel=0.05)
    assert len(found.values) == 6


def test_queries_that_a_store_cannot_answer_are_refused(store: Store) -> None:
    model, tokens = tiny(), samples(4)
    with gradstore.capture(model, store, sgd(model), **RUN) as recorder:
        model(**batch_of(tokens)).loss.backward()
        recorder._optimizer.step()
    with pytest.raises(IdError):
        of_sample(store, store.run(), "nobody")
    asked = of_sample(store, store.run(), "sample-1")
    assert list(asked.gradients) == [1]
    with pytest.raises(InfluenceError, match="no second moments"):
        influences(store, [asked], Settings(adam=True))
    with pytest.raises(InfluenceError, match="--epochs 2"):
        influences(store, [asked], Settings(epochs="2"))
    with pytest.raises(InfluenceError, match="sums over tokens"):
        tokens_of(store, influences(store, [], Settings("self"))[0], 1)
    first, explicit = (influences(store, [asked], Settings(epochs=e))[0] for e in ("first", "1"))
    assert first.values == explicit.values


def test_of_very_many_scores_the_catalog_keeps_those_shown(
    copied: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(copied.store)
    [found] = influences(store, [], Settings("self"))
    assert record_scores(store, found, []) == 1
    monkeypatch.setattr("gradstore.influence.top.KEPT", 10)
    shown = found.sample_ids[4:6]
    assert record_scores(store, found, shown) == 2
    rows = store.rows(
        "SELECT influence_id, count(*), min(rank), max(rank) FROM influences GROUP BY 1 ORDER BY 1"
    )
    assert rows == [(1, 24, 1, 24), (2, 2, 5, 6)]


# -- the command -------------------------------------------------------------------------------


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
        assert query.residual is not None
        assert 0 < query.residual <= 0.05
        assert f"conjugate gradients left {100 * query.residual:.2g} % of the query" in made.stderr
    else:
        query = by_fisher(store, store.run(), plain)
    assert f"λ {query.damping:.3g}" in made.stderr
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
    assert settings["damping"] == pytest.approx(query.damping, rel=1e-3)
    assert settings["residual"] == pytest.approx(query.residual, rel=1e-2)
    with pytest.raises(InfluenceError, match=f"made for --method dot, not for {method}"):
        influences(store, [plain], Settings(method))  # type: ignore[arg-type]
    with pytest.raises(InfluenceError, match=f"made for --method {method}, not for cosine"):
        influences(store, [query], Settings("cosine"))
    with pytest.raises(InfluenceError, match="--side input out"):
        influences(store, [query], Settings(method, sides="input"))  # type: ignore[arg-type]
    with pytest.raises(InfluenceError, match="leave --coarse out"):
        influences(store, [query], Settings(method, coarse=5))  # type: ignore[arg-type]


def test_top_by_activations_multiplies_gradients_with_hidden_states(trained: Tiny) -> None:
    asked = ("-s", trained.store, "--method", "activation", "--dry-run", "-k", 24)
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


@pytest.mark.parametrize("method", ["hvp", "newton", "activation"])
def test_tokens_make_up_the_scores_of_other_sums_too(trained: Tiny, method: str) -> None:
    found = run_json(
        "top", "--id", "p-03", "-s", trained.store, "--method", method, "--tokens", "-k", 2,
        "--dry-run",
    )  # fmt: skip
    for row in found["influences"]:
        parts = [part["score"] for part in found["tokens"] if part["id"] == row["id"]]
        assert sum(parts) == pytest.approx(row["score"], rel=1e-3)


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
