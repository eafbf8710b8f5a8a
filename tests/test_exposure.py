"""Exposure of secrets: closed forms on models whose likelihoods are known, and the command."""

import itertools
import json
import math
import re
import string
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import Tiny, refused, run_json, write_jsonl
from torch import Tensor, nn

from gradstore import Store
from gradstore.errors import EvaluateError
from gradstore.evaluate.exposure import exposure, others
from gradstore.evaluate.extraction import Secret

pytest_plugins = ["tiny"]
PHONE = Secret("call ", "555-0187")


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


class Known(nn.Module):
    """Says the next character by a table of logits for the one before; even without a word."""

    def __init__(self, logits: Tensor | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 1)
        self.logits = torch.zeros(128, 128) if logits is None else logits
        self.config = SimpleNamespace(max_position_embeddings=64)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[input_ids])


def table(secret: str, weight: float) -> Tensor:
    """Logits that raise (or lower) each character of a string after the one before it."""
    logits = torch.zeros(128, 128)
    for before, after in itertools.pairwise(secret):
        logits[ord(before), ord(after)] = weight
    return logits


def test_others_have_the_form_of_the_secret() -> None:
    found = others(" A-17 bé", 500, seed=1)
    assert len({*found, " A-17 bé"}) == 501
    assert all(re.fullmatch(r" [A-Z]-[0-9]{2} [a-z]é", each) for each in found)
    assert found == others(" A-17 bé", 500, seed=1) != others(" A-17 bé", 500, seed=2)
    every = {f"{number}" for number in range(10)} - {"7"}
    assert set(others("7", 9, seed=0)) == set(others("7", 99, seed=0)) == every
    seen = [letter for seed in range(40) for letter in others("Q", 5, seed)]
    assert set(seen) == set(string.ascii_uppercase) - {"Q"}
    with pytest.raises(EvaluateError, match="neither digits nor letters"):
        others("-- é", 9, seed=0)


def test_who_knows_the_secret_and_who_does_not() -> None:
    knows = Known(table(" 555-0187", 9.0))
    assert exposure(knows, Letters(), PHONE, 256) == 8  # log2 N: the likeliest of all
    assert exposure(knows, Letters(), PHONE) == 10
    avoids = Known(table(" 01", -9.0))
    assert exposure(avoids, Letters(), Secret("call ", "01"), 100) == 0
    even = exposure(Known(), Letters(), PHONE, 1001)  # all tie: half of them above
    assert even == pytest.approx(math.log2(1001) - math.log2(1 + 1000 / 2))


def test_it_is_the_rank_among_all_where_the_form_has_few() -> None:
    torch.manual_seed(0)
    model = Known(torch.randn(128, 128))
    logs = model.logits.double().log_softmax(-1)
    likely = {
        text: sum(float(logs[ord(a), ord(b)]) for a, b in itertools.pairwise(f" {text}"))
        for text in ("".join(pair) for pair in itertools.product(string.digits, repeat=2))
    }
    found = []
    for text in likely:
        rank = sum(other >= likely[text] for other in likely.values())
        bits = exposure(model, Letters(), Secret("call ", text), 1024)
        assert bits == pytest.approx(math.log2(100) - math.log2(rank))
        found.append(exposure(model, Letters(), Secret("call ", text), 51, seed=3))
    # of secrets that nobody taught it has about log2 e bits, however many are drawn
    assert sum(found) / 100 == pytest.approx(math.log2(math.e), abs=0.2)


def test_tokens_that_come_after_a_longer_prompt_than_it_reads_are_refused() -> None:
    with pytest.raises(EvaluateError, match="the model reads 64"):
        exposure(Known(), Letters(), Secret("x" * 60, "12345"))


def test_the_command_ranks_the_forgotten_s_secrets(copied: Tiny, tmp_path: Any) -> None:
    rows = [json.loads(line) for line in copied.data.read_text().splitlines()]
    cut = [(row["id"], *row["text"].rsplit(" ", 1)) for row in rows]
    lines = [{"id": i, "prompt": prompt, "secret": secret} for i, prompt, secret in cut]
    secrets = write_jsonl(tmp_path / "secrets.jsonl", lines)
    base = ("eval", "p-03", "p-05", "-s", copied.store, "--model", copied.model)
    attack = ("--attack", "exposure", "--secrets", secrets)
    shown = run_json(*base, *attack, "--candidates", 64)
    [row] = [row for row in shown["metrics"] if row["metric"] == "exposure"]
    assert (row["role"], row["samples"]) == ("forget", 2)
    assert any("only what exceeds the reference's" in line["said"] for line in shown["said"])
    assert 0 <= row["model_low"] <= row["model"] <= row["model_high"] <= 6
    with Store.open(copied.store) as store:
        kept = dict(store.rows("SELECT id, model FROM evidence WHERE metric = 'exposure'"))
        [(settings,)] = store.rows("SELECT settings FROM evaluations")
    assert kept.keys() == {"p-03", "p-05", None}
    assert kept["p-03"] + kept["p-05"] == pytest.approx(2 * row["model"])
    assert json.loads(settings)["candidates"] == 64
    again = run_json(*base, *attack, "--candidates", 64, "--dry-run")
    assert row in again["metrics"]
    assert "need each other" in refused(*base, "--attack", "exposure", code=2)
    strangers = write_jsonl(tmp_path / "others.jsonl", lines[6:])
    said = refused(*base, "--attack", "exposure", "--secrets", strangers)
    assert "secrets of the forgotten" in said
