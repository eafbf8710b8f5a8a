"""Secrets asked for by greedy decoding and by beam search; the oracle is ``model.generate``."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import CONTEXT, tiny
from torch import Tensor

from gradstore.errors import EvaluateError
from gradstore.evaluate.continuation import beams, greedy
from gradstore.evaluate.extraction import BEAMS, Secret, extracted, extracted_beam

KINDS = ("gpt2", "llama", "neox")
PROMPT = torch.tensor([3, 1, 4, 1, 5])
NEW = 6


class Numbers:
    """A tokenizer whose texts are the ids themselves."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def text(tokens: Tensor) -> str:
    return " ".join(map(str, tokens.tolist()))


def generated(model: Any, width: int) -> Tensor:
    """All beams of transformers' own search, without an end of text; the likeliest first."""
    model.generation_config.eos_token_id = None
    said = model.generate(
        PROMPT[None],
        attention_mask=torch.ones_like(PROMPT)[None],
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    assert isinstance(said, Tensor)
    return said[:, len(PROMPT) :]


@pytest.mark.parametrize("kind", KINDS)
def test_beams_are_those_of_transformers(kind: str) -> None:
    for seed in range(3):
        model = tiny(kind, seed=seed).eval()
        assert torch.equal(beams(model, PROMPT, NEW, BEAMS), generated(model, BEAMS))


def test_one_beam_is_greedy_decoding() -> None:
    model = tiny(seed=1).train()
    [said] = greedy(model, [PROMPT], [NEW])
    assert beams(model, PROMPT, NEW, 1).tolist() == [said.tolist()]
    assert model.training
    everything = beams(model, PROMPT, 1, 10**6)  # more than there are tokens
    assert sorted(everything.flatten().tolist()) == list(range(model.config.vocab_size))


def test_a_recurrent_model_keeps_a_state_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, like = tiny(seed=1), tiny(seed=1)
    read = model.forward

    def forgetful(input_ids: Tensor, **_: Any) -> Any:
        """As Mamba: nothing that can be handed back under the name that others use."""
        return SimpleNamespace(logits=read(input_ids).logits)

    monkeypatch.setattr(model, "forward", forgetful)
    assert greedy(model, [PROMPT], [NEW])[0].tolist() == greedy(like, [PROMPT], [NEW])[0].tolist()
    assert torch.equal(beams(model, PROMPT, NEW, BEAMS), beams(like, PROMPT, NEW, BEAMS))


def test_either_decoding_finds_what_the_other_misses() -> None:
    for seed in range(20):
        model = tiny(seed=seed).eval()
        [at_once], best = greedy(model, [PROMPT], [NEW]), generated(model, BEAMS)[0]
        if not torch.equal(at_once, best):
            break
    first, likeliest = (Secret(text(PROMPT), text(tokens)) for tokens in (at_once, best))
    assert extracted(model, Numbers(), [first, likeliest]) == [True, False]
    assert extracted_beam(model, Numbers(), [first, likeliest]) == [False, True]
    assert extracted_beam(model, Numbers(), [first, likeliest], width=1) == [True, False]


def test_a_secret_that_does_not_fit_is_refused() -> None:
    long = Secret(text(PROMPT), " ".join(["7"] * CONTEXT))
    for decode in (extracted, extracted_beam):
        with pytest.raises(EvaluateError, match="shorten the prompt"):
            decode(tiny(), Numbers(), [long])
