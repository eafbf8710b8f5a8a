"""Activations at the tokens that follow, and what they say of logits."""

from __future__ import annotations

import pytest
import torch
from models import relative, tiny
from tiny import Tiny

from gradstore.influence.activation import activations
from gradstore.training.model import load_model

pytest_plugins = ["tiny"]


def test_activations_are_hidden_states_at_the_tokens_that_follow(trained: Tiny) -> None:
    network = load_model(trained.model)
    some = [torch.tensor([5, 9, 5, 5]), torch.tensor([7, 5])]
    expected = torch.zeros(network.get_input_embeddings().weight.shape)
    for tokens in some:
        hidden = network.transformer(tokens[None]).last_hidden_state[0].detach()
        for state, following in zip(hidden[:-1], tokens[1:], strict=True):
            expected[following] -= state / 4
    network.train()
    found = activations(network, some)
    assert relative(found.dense(), expected) < 1e-5
    assert network.training
    assert not network.lm_head._forward_pre_hooks


def test_activations_foretell_logits_behind_the_head() -> None:
    network, tokens = tiny(tied=False), torch.tensor([5, 9, 5, 3])
    head = network.lm_head.weight
    step = 1e-3 * torch.randn_like(head)
    wanted = (torch.arange(3), tokens[1:])
    with torch.no_grad():
        before = network(tokens[None]).logits[0, :-1][wanted].mean()
        head -= step
        after = network(tokens[None]).logits[0, :-1][wanted].mean()
    assert activations(network, [tokens]).along(step) == pytest.approx(
        float(after - before), rel=1e-3
    )
