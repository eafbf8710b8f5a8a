"""Metrics of single samples: closed forms, and the dumb loop over tokens."""

import math
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import samples, tiny
from torch import Tensor

from gradstore.evaluate import continuation, metrics
from gradstore.evaluate.continuation import continuations, greedy, rouge_l_recall
from gradstore.evaluate.loss import sample_losses
from gradstore.evaluate.metrics import Predictions, predictions
from gradstore.training.model import context_of

KINDS = ("gpt2", "llama", "neox")
WORDS = st.lists(st.sampled_from(["ada", "ben", "7", "cleo"]), max_size=8)


def made(log_probs: list[float], likeliest: list[bool] | None = None) -> Predictions:
    values = torch.tensor(log_probs, dtype=torch.float64)
    hits = torch.tensor(likeliest or [True] * len(log_probs))
    return Predictions(values, torch.full_like(values, -2.0), torch.full_like(values, 0.5), hits)


def test_closed_forms() -> None:
    of = made([math.log(0.5), math.log(0.125)])
    assert metrics.loss(of) == pytest.approx(math.log(4))
    assert metrics.probability(of) == pytest.approx(0.25)  # the geometric mean
    assert metrics.mean_probability(of) == pytest.approx((0.5 + 0.125) / 2)  # the arithmetic one
    assert metrics.zlib_ratio(of, "text") == pytest.approx(
        math.log(4) / len(zlib.compress(b"text"))
    )


def test_mean_probability_orders_samples_otherwise_than_their_loss() -> None:
    even, odd = made([math.log(0.4)] * 2), made([math.log(0.999), math.log(0.001)])
    assert metrics.loss(even) < metrics.loss(odd)
    assert metrics.probability(even) > metrics.probability(odd)
    assert metrics.mean_probability(even) < metrics.mean_probability(odd)


@pytest.mark.parametrize(
    ("likeliest", "exact", "strength"),
    [
        ([True] * 4, 1.0, 1.0),
        ([False] * 4, 0.0, 0.0),  # no floor of 1/n
        ([True, True, True, False], 0.75, 0.0),
        ([False, True, True, True], 0.75, 0.75),
        ([True, False, True, True], 0.75, 0.5),
    ],
)
def test_memorization_and_extraction(likeliest: list[bool], exact: float, strength: float) -> None:
    of = made([-1.0] * 4, likeliest)
    assert metrics.exact_memorization(of) == exact
    assert metrics.extraction_strength(of) == strength


def test_min_k_takes_the_lowest_and_at_least_one() -> None:
    of = made([-5.0, -1.0, -3.0, -2.0, -4.0, -1.0, -1.0, -1.0, -1.0, -1.0])
    assert metrics.min_k(of) == pytest.approx(-4.5)
    assert metrics.min_k(of, 0.01) == -5
    assert metrics.min_k_plus_plus(of) == pytest.approx((-4.5 + 2) / 0.5)
    assert metrics.min_k(of, 1.0) == pytest.approx(-metrics.loss(of))


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_those_of_each_token_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tiny(kind), list(samples(6).values())
    monkeypatch.setattr(metrics, "_LOGITS_AT_ONCE", 150 * 25)  # several batches, of two and more
    model.train()
    for sample, of in zip(tokens, predictions(model, tokens), strict=True):
        logits = model(input_ids=sample[None]).logits[0].double()
        for at, row in enumerate(logits[:-1]):
            p = row.softmax(-1)
            deviation = (p * (p.log() - (p * p.log()).sum()) ** 2).sum().sqrt()
            assert of.log_probs[at].item() == pytest.approx(p[sample[at + 1]].log().item(), 1e-4)
            assert of.means[at].item() == pytest.approx((p * p.log()).sum().item(), 1e-4)
            assert of.deviations[at].item() == pytest.approx(deviation.item(), 1e-3)
            assert bool(of.likeliest[at]) == (int(row.argmax()) == int(sample[at + 1]))
        assert len(of.log_probs) == len(sample) - 1
    assert model.training


def test_the_loss_is_that_of_sample_losses() -> None:
    model, tokens = tiny(), list(samples(5, seed=3).values())
    found = [metrics.figures(of)["loss"] for of in predictions(model, tokens)]
    assert found == pytest.approx(sample_losses(model, tokens).tolist(), rel=1e-5)


def test_certain_predictions_have_no_nan() -> None:
    model = tiny()
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1e4)
    for of in predictions(model, list(samples(4).values())):
        assert all(math.isfinite(value) for value in metrics.figures(of).values())


# -- continuations -----------------------------------------------------------------------------


def greedily(model: torch.nn.Module, tokens: Tensor, prefix: int) -> list[int]:
    grown = tokens[:prefix]
    while len(grown) < len(tokens):
        likeliest = model(input_ids=grown[None]).logits[0, -1].argmax()
        grown = torch.cat([grown, likeliest[None]])
    return grown[prefix:].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", [None, 3])
@torch.no_grad()
def test_continuations_are_greedy(kind: str, prefix: int | None) -> None:
    model, tokens = tiny(kind), list(samples(6, seed=1).values())
    for sample, said in zip(tokens, continuations(model, tokens, prefix), strict=True):
        given = min(prefix or max(1, len(sample) // 2), len(sample) - 1)
        assert said.tolist() == greedily(model, sample, given)


@torch.no_grad()
def test_decoding_stops_at_the_end_and_at_what_the_model_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny().train()
    prompts = [torch.tensor(tokens) for tokens in ([3, 4], [5, 6], [7], [3, 4, 5], [9, 2])]
    monkeypatch.setattr(continuation, "TOGETHER", 2)
    free = greedy(model, prompts, [6, 4, 5, 0, 3])
    assert [len(said) for said in free] == [6, 4, 5, 0, 3]
    for prompt, said in zip(prompts, free, strict=True):
        assert said.tolist() == greedily(model.eval(), torch.cat([prompt, said]), len(prompt))
    end = int(free[0][2])
    for said, stopped in zip(
        free, greedy(model.train(), prompts, [6, 4, 5, 0, 3], end), strict=True
    ):
        tokens = said.tolist()
        expected = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        assert stopped.tolist() == expected
    assert model.training
    [said] = greedy(model, [prompts[0]], [9999])
    assert len(said) == context_of(model) - 2
    assert len(greedy(model, [said[:1].repeat(context_of(model) + 1)], [5])[0]) == 0


def test_rouge_in_closed_form() -> None:
    assert rouge_l_recall("The cat sat.", "the CAT lay") == pytest.approx(2 / 3)
    assert rouge_l_recall("", "the cat") == 0
    assert rouge_l_recall("anything", "...") == 1
    assert rouge_l_recall("555-7107", "579-555-7107") == pytest.approx(2 / 3)


@given(WORDS, WORDS)
def test_rouge_is_the_longest_common_subsequence(one: list[str], other: list[str]) -> None:
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
            )
    expected = table[-1][-1] / len(other) if other else 1
    assert rouge_l_recall(" ".join(one), " ".join(other)) == pytest.approx(expected)
