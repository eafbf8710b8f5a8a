"""Attacks and the checks that they make: oracles, and models that are known to pass or fail."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import samples, tiny
from torch import Tensor
from torch.nn.functional import cross_entropy

from gradstore.errors import EvaluateError
from gradstore.evaluate import check
from gradstore.evaluate.attacks import (
    On,
    Relearned,
    RelearnSettings,
    gain,
    relearn,
    rounded,
    said,
    share_of,
    split,
)
from gradstore.evaluate.check import Standing, third_bar
from gradstore.evaluate.loss import log_likelihoods, sample_losses

FAST = RelearnSettings(steps=4, learning_rate=0.01)


def drawn(count: int, seed: int) -> list[Tensor]:
    return list(samples(count, seed=seed, longest=16).values())


def taught(model: Any, tokens: list[Tensor], steps: int = 40) -> Any:
    """The model after training on the samples."""
    model = deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        (-log_likelihoods(model, tokens).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


# -- relearning --------------------------------------------------------------------------------


def test_some_records_are_taught_and_the_others_looked_at() -> None:
    tokens = drawn(5, 1)
    parts = split(tokens, 0.4, seed=0)
    assert (len(parts.taught), len(parts.rest)) == (2, 3)
    assert {id(each) for each in parts.taught + parts.rest} == {id(each) for each in tokens}
    assert all(bool(mask.all()) for mask in parts.scored)
    assert len({id(split(tokens, 0.2, seed).taught[0]) for seed in range(20)}) > 1
    assert len(split(tokens, 0.99, 0).rest) == len(split(tokens, 0.01, 0).taught) == 1


def test_of_one_record_the_beginning_is_taught_and_the_end_looked_at() -> None:
    tokens = torch.arange(40)
    cuts = set()
    for seed in range(10):
        parts = split([tokens], 0.5, seed)
        cut = len(parts.taught[0])
        assert parts.taught[0].tolist() == list(range(cut))
        assert tokens[1:][parts.scored[0]].tolist() == list(range(cut, 40))  # none of them taught
        assert 10 <= cut <= 30
        cuts.add(cut)
    assert len(cuts) > 3
    with pytest.raises(EvaluateError, match="four tokens"):
        split([tokens[:3]], 0.5, 0)


def test_a_step_is_adamws_on_the_mean_loss_per_token() -> None:
    model, tokens = tiny(), drawn(4, 2)
    before = [weight.clone() for weight in model.parameters()]
    settings = RelearnSettings(steps=1, learning_rate=0.01, seeds=(7,))
    [found] = relearn(model, tokens, settings)
    parts, oracle = split(tokens, 0.5, 7), deepcopy(model)
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=0.01, weight_decay=0.0)
    losses = [
        cross_entropy(oracle(input_ids=t[None]).logits[0, :-1], t[1:], reduction="sum")
        for t in parts.taught
    ]
    (torch.stack(losses).sum() / sum(len(t) - 1 for t in parts.taught)).backward()
    optimizer.step()
    for losses_of, samples_of in ((found.rest, parts.rest), (found.taught, parts.taught)):
        expected = [float(sample_losses(m, samples_of).mean()) for m in (model, oracle)]
        assert list(losses_of) == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_curves_are_drawn_by_their_seeds() -> None:
    model, tokens = tiny(), drawn(6, 3)
    curves = relearn(model, tokens, FAST)
    assert curves == relearn(model, tokens, FAST)
    assert [len(curve.rest) for curve in curves] == [5, 5, 5]
    assert curves[0] != curves[1]


def test_held_out_records_are_taught_and_all_of_the_forgotten_looked_at() -> None:
    model, tokens, others = tiny(), drawn(3, 4), drawn(9, 5)
    settings = RelearnSettings(steps=2, learning_rate=0.01, on="holdout", seeds=(0, 1))
    first, second = relearn(model, tokens, settings, others)
    assert first.rest[0] == pytest.approx(float(sample_losses(model, tokens).mean()))
    assert first.taught[0] == pytest.approx(float(sample_losses(model, others).mean()))
    assert first.taught[1] < first.taught[0]
    assert first.rest[1] != second.rest[1]  # the seeds draw the batches
    assert relearn(model, [tokens[0]], settings, others)[0].rest  # a single one is not cut
    with pytest.raises(EvaluateError, match="no held-out records"):
        relearn(model, tokens, settings)


def test_shares_that_are_taught() -> None:
    tokens = drawn(40, 6)
    for text, count in (("1%", 1), ("10%", 4), ("12.5%", 5), ("50%", 20), ("99.9%", 39)):
        share = share_of(text)
        assert share != "holdout"
        assert len(split(tokens, share, 0).taught) == count
    assert share_of("holdout") == "holdout"
    for text in ("0%", "100%", "10", "%", "-1%", "ten%", "nan%", "²%", ""):
        with pytest.raises(ValueError, match="like 10%"):
            share_of(text)


def test_harm_is_told_from_relearning() -> None:
    taught, harmed = Relearned([1.0, 1.1], (1.0, 0.5)), Relearned([1.0, 2.0], (1.0, 0.5))
    [line] = said({"original": [taught], "model": [harmed]}, RelearnSettings(on=0.01))
    assert line.startswith("Relearning on 1 % of the forgotten, 10 steps at a rate of 0.0001: ")
    assert "original 1.000 to 0.500" in line
    line, warning = said({"model": [harmed]}, RelearnSettings(on="holdout"))
    assert "held-out records" in line
    assert "shook the model more than it taught (the rest +1.000, the taught -0.500)" in warning


def test_gain_in_closed_form() -> None:
    assert gain([3, 2, 1], [3, 3, 3]) == 1.5
    assert gain([6, 3, 3], [3, 3, 3]) == 0  # fell from above to where the reference is
    assert gain([2, 2, 2], [3, 3, 3]) == 0  # lower from the start, but not falling


@pytest.mark.parametrize(
    "setting", [{"steps": 0}, {"on": 1.0}, {"on": 0.0}, {"learning_rate": 0.0}]
)
def test_settings_that_mean_nothing_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(EvaluateError):
        RelearnSettings(**setting)


# -- rounding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_int8_rounds_rows_and_bf16_everything(kind: str) -> None:
    model = tiny(kind)
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = 0  # a row without a step
    coarse, half = rounded(model, "int8"), rounded(model, "bf16")
    assert coarse.get_output_embeddings().weight is coarse.get_input_embeddings().weight
    pairs = zip(model.named_parameters(), coarse.parameters(), half.parameters(), strict=True)
    for (name, exact), eighth, sixteenth in pairs:
        assert torch.equal(sixteenth, exact.bfloat16().float()), name
        if exact.dim() == 1:
            assert torch.equal(eighth, exact), name
            continue
        for row, found in zip(exact, eighth, strict=True):
            step = row.abs().max() / 127
            assert (row - found).abs().max() <= step / 2 * (1 + 1e-3), name
            levels = found / step if step else found
            assert torch.allclose(levels, levels.round(), atol=1e-3), name


# -- checks ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    """An original that learned some records, and a reference that learned only the others."""
    forgotten, others, held_out = drawn(6, 11), drawn(6, 12), drawn(30, 13)
    start = tiny(seed=5)
    return {
        "original": taught(start, forgotten + others),
        "reference": taught(start, others),
        "forgotten": forgotten,
        "held_out": held_out,
    }


def bar(
    world: dict[str, Any], unlearned: Any, settings: RelearnSettings = FAST
) -> dict[str, bool | None]:
    found = third_bar(
        world["reference"], unlearned, world["original"], world["forgotten"], world["held_out"],
        settings=settings,
    )  # fmt: skip
    return {each.check: each.passed for each in found}


@pytest.mark.parametrize("on", [0.5, "holdout"])
def test_the_reference_itself_takes_the_bar(world: dict[str, Any], on: On) -> None:
    assert bar(world, world["reference"], replace(FAST, on=on)) == dict.fromkeys(
        ("membership", "relearning", "rounding"), True
    )


def test_doing_nothing_does_not(world: dict[str, Any]) -> None:
    found = bar(world, world["original"])
    assert found["membership"] is False
    assert found["rounding"] is None  # it was not forgotten, so no verdict could survive


def test_relearning_may_vary_as_the_reference_does() -> None:
    theirs = [[3.0, 2.9], [3.0, 2.8], [3.0, 2.7]]  # gains 0.1, 0.2, 0.3: their deviation is 0.1
    assert check.relearning([[3.0, 2.71]] * 3, theirs).passed
    assert check.relearning([[3.0, 2.69]] * 3, theirs).passed is False
    assert check.relearning([[9.0, 2.69]] * 3, theirs).passed is False  # hidden, and back at once
    assert check.relearning([[9.0, 8.0]] * 3, theirs).passed


def test_rounding_that_brings_it_back_fails() -> None:
    fine, back = Standing(1.0, 0.2), Standing(0.3, 0.2)
    assert check.rounding({"as it is": fine, "bf16": fine}).passed
    assert check.rounding({"as it is": fine, "bf16": back}).passed is False
    assert check.rounding({"as it is": back, "bf16": back}).passed is None
    assert not Standing(1.6, 0.2).forgotten  # overshot
    assert not Standing(float("nan"), 0.2).forgotten


def test_membership_needs_held_out_samples() -> None:
    assert check.membership([1.0], [], [1.0], []).passed is None
    outside = [float(x) for x in range(20)]
    assert check.membership([10.0], outside, [10.0], outside).passed
    assert check.membership([-1.0], outside, [10.0], outside).passed is False
    assert check.membership([99.0], outside, [10.0], outside).passed is False  # stands out


def test_a_secret_that_the_reference_says_too_is_no_leak() -> None:
    assert check.extraction([1, 0], [1, 0]).passed
    assert check.extraction([0, 1], [1, 0]).passed is False
