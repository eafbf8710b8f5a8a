"""Perplexity on a general text: closed forms, the dumb loop, and what the command keeps."""

import json
import math
from pathlib import Path

import pytest
import torch
from models import CONTEXT, VOCABULARY, tiny
from tiny import Tiny, refused, run_json
from torch.nn.functional import cross_entropy

from gradstore import Store
from gradstore.errors import DataError, EvaluateError
from gradstore.evaluate import general
from gradstore.evaluate.loss import token_losses
from gradstore.training.model import load_model, load_tokenizer

pytest_plugins = ["tiny"]


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}


def test_windows_lie_end_to_end(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 9)  # 72 = 2 * 32 + 8
    found = general.windows(text, Letters(), tiny())
    assert [len(window) for window in found] == [CONTEXT, CONTEXT, 8]
    assert torch.cat(found).tolist() == [ord(letter) for letter in "abcdefgh" * 9]
    text.write_text("x" * (CONTEXT + 1))
    assert len(general.windows(text, Letters(), tiny())) == 1  # one token predicts nothing
    text.write_text("x")
    with pytest.raises(DataError, match="at least two"):
        general.windows(text, Letters(), tiny())
    with pytest.raises(EvaluateError, match="tokenizer"):
        general.windows(text, None, tiny())


def test_it_is_the_loss_of_every_token_but_the_first_of_each_window(tmp_path: Path) -> None:
    text, model = tmp_path / "text.txt", tiny()
    text.write_text("".join(chr(97 + k * k % 26) for k in range(300)))
    total, count = 0.0, 0
    for window in general.windows(text, Letters(), model):
        logits = model(input_ids=window[None]).logits[0]
        for at in range(1, len(window)):
            total += cross_entropy(logits[at - 1], window[at]).item()
            count += 1
    nats = general.read({"model": model}, general.windows(text, Letters(), model))["model"]
    found = general.loss(nats)
    assert found.value == pytest.approx(total / count, rel=1e-5)
    assert found.low < found.value < found.high
    as_many = general.perplexity(nats)
    assert as_many.value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert (as_many.low, as_many.high) == pytest.approx((math.exp(found.low), math.exp(found.high)))


def test_a_model_that_knows_nothing_finds_all_tokens_equally_likely(tmp_path: Path) -> None:
    text, model = tmp_path / "text.txt", tiny()
    text.write_text("to be or not to be " * 20)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    cut = general.windows(text, Letters(), model)
    found = general.perplexity(general.read({"model": model}, cut)["model"])
    assert vars(found) == pytest.approx(dict.fromkeys(("value", "low", "high"), VOCABULARY))


def test_the_command_prints_and_keeps_it(copied: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "novel.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 12, "utf-8")
    base = ("eval", "p-03", "-s", copied.store, "--model", copied.model)
    shown = run_json(*base, "--original", copied.model, "--general", text)
    rows = {row["metric"]: row for row in shown["metrics"] if row["role"] == "general"}
    model = load_model(copied.model)
    cut = general.windows(text, load_tokenizer(copied.model), model)
    nats = torch.cat(token_losses(model, cut))
    assert rows["loss"]["model"] == pytest.approx(float(nats.mean()), rel=1e-5)
    assert rows["perplexity"]["original"] == rows["perplexity"]["model"]
    with Store.open(copied.store) as store:
        kept = store.table("FROM evidence WHERE role = 'general' ORDER BY metric")
        [(settings,)] = store.rows("SELECT settings FROM evaluations")
    assert [row["metric"] for row in kept] == ["loss", "perplexity"]
    for row in kept:
        names = ("samples", "model", "model_low", "model_high", "original_low")
        assert {n: row[n] for n in names} == {n: rows[row["metric"]][n] for n in names}
        assert row["samples"] == len(cut)
    assert json.loads(settings)["general"] == general.digest_of(text)
    assert str(text) not in settings
    text.write_bytes(b"\xff\xfe no text")
    said = refused(*base, "--attack", "relearn", "--general", text)
    assert "cannot be read as UTF-8" in said
    assert "relearning" not in said  # nothing takes long before
