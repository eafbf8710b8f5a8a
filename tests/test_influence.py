"""A query is autograd's gradient; scores over a store are the dumb loop's, and foretell."""

import pytest
import torch
from models import KINDS, alone, batch_of, samples, sgd, snapshot, tiny
from records import RUN, VOCABULARY, WIDTH
from tiny import Tiny

import gradstore
from gradstore import FactoredGradient, Store
from gradstore.capture.taps import embedding_of
from gradstore.errors import IdError, InfluenceError, ModelError, SettingsError
from gradstore.evaluate.continuation import greedy
from gradstore.evaluate.extraction import Secret, completion
from gradstore.evaluate.loss import log_likelihoods
from gradstore.factored import Term
from gradstore.influence.query import Checkpoint, Query, gradient_of, of_sample
from gradstore.influence.questions import record_scores
from gradstore.influence.top import Settings, influences, tokens_of
from gradstore.store import ModelIdentity
from gradstore.training.model import load_model, load_tokenizer

pytest_plugins = ["tiny"]
MODEL = ModelIdentity("GPT2LMHeadModel", VOCABULARY, WIDTH, WIDTH, 64, True)
SHAPE = (VOCABULARY, WIDTH)
ASKED = "Ada is a baker, born in 1966"


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
    [more] = greedy(network, [start], [5])
    assert len(more) == 5
    longer, said = torch.cat([start, more]), tokenizer.decode(more).strip()
    assert said == completion(network, tokenizer, Secret(prompt, " in 1966; phone"))[: len(said)]
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
    spans = ",".join(map(str, epochs))
    settings = Settings(method, epochs=spans, precision="float32")  # type: ignore[arg-type]
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
        norms = [r.gradient(store.model).norm() for r in store.records([number], 1)]
        assert found.norms is not None
        mean = found.norms[found.sample_ids.index(number)]
        assert mean == pytest.approx(sum(norms) / len(norms), rel=1e-4)
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
    parts = tokens_of(store, found, [number])[number]
    assert float(parts.sum()) == pytest.approx(found.values[0], rel=1e-4)
    with pytest.raises(SettingsError, match="--adam weighs"):
        influences(store, [asked], Settings("cosine", adam=True))


@pytest.mark.parametrize("tied", [True, False])
def test_scores_foretell_what_a_step_does_to_the_querys_loss(store: Store, tied: bool) -> None:
    model, tokens = tiny(tied=tied), samples(6, 1)
    [asked] = samples(1, 99).values()
    weight = embedding_of(model).weight
    optimizer = torch.optim.SGD([weight], lr=3e-2)
    before = Query("asked", {None: gradient_of(model, asked)})
    known = log_likelihoods(model, [asked]).detach()
    with gradstore.capture(model, store, optimizer, sides="both", top_k=149):
        model(**batch_of(tokens)).loss.backward()
        optimizer.step()
    fallen = float(log_likelihoods(model, [asked]).detach() - known)
    [found] = influences(store, [before], Settings(precision="float32"))
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
    with pytest.raises(SettingsError, match="sums over tokens"):
        tokens_of(store, influences(store, [], Settings("self"))[0], [1])
    first, explicit = (influences(store, [asked], Settings(epochs=e))[0] for e in ("first", "1"))
    assert first.values == explicit.values


def test_of_very_many_scores_the_catalog_keeps_those_shown(
    copied: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(copied.store)
    [found] = influences(store, [], Settings("self"))
    assert record_scores(store, found, []) == 1
    monkeypatch.setattr("gradstore.influence.questions.KEPT", 10)
    shown = found.sample_ids[4:6]
    assert record_scores(store, found, shown) == 2
    rows = store.rows(
        "SELECT influence_id, count(*), min(rank), max(rank) FROM influences GROUP BY 1 ORDER BY 1"
    )
    assert rows == [(1, 24, 1, 24), (2, 2, 5, 6)]
