"""What benchmarks/peers.py gives every library, and gradstore's own part in it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


@pytest.fixture
def setting(tmp_path: Path) -> Any:
    from beside.common import Setting

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=1, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    (tmp_path / "work").mkdir()
    records = [torch.randint(1, 40, (length,)) for length in (9, 12, 5, 12)]
    return Setting(tmp_path / "model", records, tmp_path / "work")


def gradient(network: Any, tokens: Tensor) -> Tensor:
    from beside.common import batches, summed_loss

    [batch] = batches([tokens])
    [found] = torch.autograd.grad(summed_loss(network, batch), network.transformer.wte.weight)
    return torch.as_tensor(found)


def test_gradstores_scores_are_dot_products_of_the_embeddings_gradients(setting: Any) -> None:
    from beside.with_gradstore import Captured

    queries = [torch.randint(1, 40, (7,)), torch.randint(1, 40, (10,))]
    peer = Captured(setting)
    peer.build()
    found = peer.search(peer.gradients(queries))
    network = GPT2LMHeadModel.from_pretrained(setting.checkpoint)
    g, q = (
        torch.stack([gradient(network, tokens).flatten() for tokens in some])
        for some in (setting.records, queries)
    )
    share = 1e-4 / sum(len(tokens) - 1 for tokens in setting.records)  # one step, a mean
    expected = (share * g @ q.T).numpy()
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    of_records, once = peer.sizes()
    assert of_records > 0
    assert once > 0


def test_linear_maps_in_place_of_conv1d_change_nothing(setting: Any) -> None:
    from beside.common import batches, linearized, summed_loss

    batch = next(batches(setting.records))
    network = GPT2LMHeadModel.from_pretrained(setting.checkpoint)
    linear = linearized(setting.checkpoint)
    assert not any(type(module).__name__ == "Conv1D" for module in linear.modules())
    with torch.no_grad():
        together = summed_loss(network, batch)
        alone = [summed_loss(network, next(batches([tokens]))) for tokens in setting.records]
        torch.testing.assert_close(summed_loss(linear, batch), together)
    torch.testing.assert_close(torch.stack(alone).sum(), together)


def test_the_influence_benchmark_holds_its_methods_against_the_best_of_others() -> None:
    from influence import Plan, drawn, judge

    plan = Plan(people=20, queries=2, halves=12, tenths=4)
    subsets, draw = drawn(plan, 0), np.random.default_rng(0)
    truth = draw.standard_normal((20, 4))
    actual = subsets.astype(float) @ truth
    own = np.zeros((20, 4), dtype=bool)
    noisy = truth + 2 * draw.standard_normal((20, 4))
    scores = {"right": truth, "noisy": noisy, "wrong": -truth}
    right, middling, wrong = judge(plan, scores, actual, subsets, own, 0, ["noisy", "wrong"])
    assert right["LDS held out"]["mean"] == pytest.approx(1)
    assert wrong["LDS held out"]["mean"] == pytest.approx(-1)
    assert middling["less noisy"]["mean"] == 0
    above = 1 - middling["LDS held out"]["mean"]
    assert right["less noisy"]["mean"] == pytest.approx(above)
    assert above > 0
