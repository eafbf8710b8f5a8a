"""Any linear layer, captured in factors, is what autograd gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    EXACT,
    IGNORED,
    State,
    batch_of,
    collate,
    records,
    relative,
    rows,
    samples,
    sgd,
    snapshot,
    take_step,
    tiny,
    train,
)
from records import assert_equal
from tiny import digests
from torch import Tensor
from torch.nn.functional import cross_entropy

import gradstore
from gradstore import GradStoreCallback, IdCollator, Store
from gradstore.capture.layers import linear_layers, parameter
from gradstore.errors import CaptureError
from gradstore.store.record import Record

pytest_plugins = ["tiny"]
BLOCKS: dict[str, Any] = {**EXACT, "layers": "blocks"}
H = ("transformer.h.0", "transformer.h.1")
KINDS = [("gpt2", True), ("llama", False), ("opt", True)]


def own_gradients(kind: str, tied: bool, state: State, tokens: Tensor, start: int) -> State:
    """Autograd's gradient of one sample's summed loss, by parameter."""
    model = tiny(kind, tied=tied)
    model.load_state_dict(state)
    counting = {"position_ids": start + torch.arange(len(tokens))[None]} if start else {}
    logits = model(input_ids=tokens[None], **counting).logits[0, :-1]
    cross_entropy(logits, tokens[1:], reduction="sum").backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def of_blocks(store: Store, record: Record) -> State:
    """The stored gradients of all captured linear layers, dense, biases as vectors."""
    layers = [layer.layer for layer in store.layers(store.run()["run_id"])]
    found = record.gradients(store.model, layers).items()
    return {n: g.dense()[0] if n.endswith(".bias") else g.dense() for n, g in found}


def assert_close(found: State, truth: State) -> None:
    """Each to a relative 1e-5, but for rounding: a key's bias, say, has no gradient but that."""
    whole = torch.stack([gradient.norm() for gradient in truth.values()]).norm()
    for weight, gradient in found.items():
        error, norm = (gradient - truth[weight]).norm(), truth[weight].norm()
        assert float(error) <= float(1e-5 * norm + 2e-7 * whole), weight


def assert_exact(
    store: Store, before: State, tokens: dict[str, Tensor], kind: str, tied: bool
) -> int:
    """Every stored gradient is autograd's; returns how many there were."""
    count = 0
    for name, [record] in records(store).items():
        start = (record.exposure.position_start or 0) if kind == "gpt2" else 0
        truth = own_gradients(kind, tied, before, tokens[name], start)
        found = of_blocks(store, record)
        assert_close(found, truth)
        count += len(found)
    return count


# -- capture -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tied", "side"),
    [("gpt2", True, "left"), ("llama", False, "left"), ("opt", True, "right")],
)
def test_every_weight_and_bias_is_what_autograd_gives(
    kind: str, tied: bool, side: str, store: Store
) -> None:
    tokens, model = samples(7), tiny(kind, tied=tied)
    named = list(tokens.items())
    batches = [batch_of(dict(named[:4]), side), batch_of(dict(named[4:]), side)]
    before, optimizer = snapshot(model), sgd(model)
    with gradstore.capture(model, store, optimizer, **BLOCKS):
        take_step(model, optimizer, *batches)
    modules = linear_layers(model, "blocks")
    expected = {f"{n}.{kind}" for n, m in modules.items() for kind, _ in m.named_parameters()}
    assert assert_exact(store, before, tokens, kind, tied) == 7 * len(expected)
    assert not any("lm_head" in name or "embed" in name for name in expected)
    assert len(modules) == {"gpt2": 8, "llama": 14, "opt": 12}[kind]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_run_again_in_the_backward_pass(reentrant: bool, store: Store) -> None:
    tokens, model = samples(5), tiny()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    model.enable_input_require_grads()
    before, optimizer = snapshot(model), sgd(model)
    with gradstore.capture(model, store, optimizer, **BLOCKS):
        take_step(model, optimizer, batch_of(tokens))
    assert assert_exact(store, before, tokens, "gpt2", True) == 5 * 16


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_passes_that_share_a_backward_pass(tmp_path: Path) -> None:
    tokens = list(samples(4).items())
    for reentrant in (None, False, True):
        store, model = Store.create(tmp_path / str(reentrant), dtype="float32"), tiny()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.train()
        before, optimizer = snapshot(model), sgd(model)
        with gradstore.capture(model, store, optimizer, **BLOCKS):
            losses = [model(**batch_of(dict(part))).loss for part in (tokens[:2], tokens[2:])]
            sum(losses).backward()
            optimizer.step()
        assert assert_exact(store, before, dict(tokens), "gpt2", True) == 4 * 16


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_a_compiled_model(store: Store) -> None:
    torch.compiler.reset()
    tokens, model = samples(3), tiny(num_hidden_layers=1)
    before, optimizer = snapshot(model), sgd(model)
    with gradstore.capture(model, store, optimizer, layers="*.c_fc"):
        take_step(torch.compile(model, backend="eager"), optimizer, batch_of(tokens))
    truth = tiny(num_hidden_layers=1)
    truth.load_state_dict(before)
    truth(**{k: v for k, v in batch_of(tokens).items() if k != "sample_ids"}).loss.backward()
    assert_sums_to(store, {n: p.grad for n, p in truth.named_parameters()})


def assert_sums_to(store: Store, applied: dict[str, Any]) -> None:
    """The records' gradients, each by its share of the batch, are what the optimizer was given."""
    total: dict[str, Tensor] = {}
    for [record] in records(store).values():
        for name, gradient in of_blocks(store, record).items():
            part = gradient * record.exposure.batch_share
            total[name] = total[name] + part if name in total else part
    assert total
    assert_close(total, applied)


@pytest.mark.parametrize("labels", ["all", "prompt"])
@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_the_samples_of_a_batch_sum_to_its_gradient(
    kind: str, tied: bool, labels: str, store: Store
) -> None:
    # So nothing is lost with the last position and the padding, which are not stored.
    model, batch = tiny(kind, tied=tied), batch_of(samples(6, 2, longest=9))
    if labels == "prompt":
        batch["labels"][:, 1] = IGNORED
    optimizer = sgd(model)
    with gradstore.capture(model, store, optimizer, **BLOCKS):
        model(**batch).loss.backward()
        given = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    assert_sums_to(store, given)


def test_bfloat16_autocast_is_within_two_percent(tmp_path: Path) -> None:
    tokens, store, model = samples(6), Store.create(tmp_path / "store"), tiny(initializer_range=0.1)
    before, optimizer = snapshot(model), sgd(model)
    with gradstore.capture(model, store, optimizer, **BLOCKS):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch_of(tokens)).loss
        loss.backward()
        optimizer.step()
    for name, [record] in records(store).items():
        truth = own_gradients("gpt2", True, before, tokens[name], 0)
        found = of_blocks(store, record)
        assert record.layers["transformer.h.0.attn.c_attn"].A.dtype is torch.bfloat16
        for weight in found:
            if weight.endswith(".weight"):
                assert relative(found[weight], truth[weight]) <= 2e-2, weight


def test_factors_and_their_algebra(store: Store) -> None:
    model = tiny("llama", tied=False)
    optimizer = sgd(model)
    layer = "model.layers.1.mlp.down_proj"
    with gradstore.capture(model, store, optimizer, layers=[layer, "*.q_proj"]):
        take_step(model, optimizer, batch_of(samples(2)))
    [one], [other] = records(store).values()
    assert list(one.layers) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        layer,
    ]
    factors = one.layers[layer]
    t = len(one.tokens) - 1
    assert (factors.A.shape, factors.B.shape) == ((t, 32), (t, 16))
    g, h = one.gradient(store.model, layer), other.gradient(store.model, layer)
    assert g.shape == tuple(parameter(model, f"{layer}.weight").shape)
    assert torch.allclose(g.dense(), factors.B.T @ factors.A)
    assert g.dot(h) == pytest.approx(float((g.dense() * h.dense()).sum()), rel=1e-4)
    assert g.norm() == pytest.approx(float(g.dense().norm()), rel=1e-4)
    assert torch.allclose(factors.bias().dense()[0], factors.B.sum(0), atol=1e-6)
    with pytest.raises(ValueError, match=r"no layer 'lm_head' was captured; .*embedding, model"):
        one.gradient(store.model, "lm_head")


def test_without_layers_a_store_is_as_it_was(tmp_path: Path) -> None:
    written = []
    asked: dict[str, dict[str, Any]] = {
        "plain": {},
        "empty": {"layers": ()},
        "one": {"layers": "*.c_fc"},
    }
    for name, options in asked.items():
        store, model = Store.create(tmp_path / name, dtype="float32"), tiny()
        optimizer = sgd(model)
        with gradstore.capture(model, store, optimizer, **options):
            take_step(model, optimizer, batch_of(samples(3)))
        arrays = digests(tmp_path / name / "segments")
        written.append(
            {path: d for path, d in arrays.items() if not path.endswith("manifest.json")}
        )
        assert len(store.layers(1)) == (2 if name == "one" else 0)
    assert written[0] == written[1]
    names = [{path.split("/")[2] for path in each if path.count("/") > 2} for each in written]
    assert names[2] - names[0] == {
        f"transformer.h.{block}.mlp.c_fc.{side}" for block in (0, 1) for side in "AB"
    }


def test_a_pattern_that_matches_nothing(store: Store) -> None:
    model = tiny()
    with pytest.raises(CaptureError, match=r"is named '\*\.q_proj'; there are transformer\.h\.0"):
        linear_layers(model, "blocks,*.q_proj")
    with pytest.raises(CaptureError, match="is named 'lm_head'"):
        linear_layers(model, ["lm_head"])
    model.transformer.h[0].attn.c_attn.weight.requires_grad_(False)
    assert "transformer.h.0.attn.c_attn" not in linear_layers(model, "blocks")
    with (
        pytest.raises(CaptureError, match="is named 'nothing'"),
        gradstore.capture(model, store, sgd(model), layers="nothing"),
    ):
        pytest.fail("capturing began")
    assert not (store.root / "catalog.duckdb").exists()


def test_layers_that_cannot_be_captured(store: Store) -> None:
    shared = tiny("llama")
    shared.model.layers[1].mlp = shared.model.layers[0].mlp
    optimizer = sgd(shared)
    with (
        pytest.raises(CaptureError, match="does not run once at every position"),
        gradstore.capture(shared, store, optimizer, layers="*.up_proj"),
    ):
        take_step(shared, optimizer, batch_of(samples(2)))
    shared.model.layers[1].mlp = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(16, 32)})
    shared.model.layers[1].mlp["up_proj"].weight = shared.model.layers[0].mlp.up_proj.weight
    with pytest.raises(CaptureError, match="share one weight"):
        linear_layers(shared, "*.up_proj")
    model = tiny("llama")
    slow = [p for n, p in model.named_parameters() if "down_proj" in n]
    fast = [p for n, p in model.named_parameters() if "down_proj" not in n]
    groups = torch.optim.SGD([{"params": fast, "lr": 0.1}, {"params": slow, "lr": 0.01}])
    torch.optim.lr_scheduler.LambdaLR(groups, lambda step: step / 5)  # both at nought to begin with
    with (
        pytest.raises(CaptureError, match="another learning rate than the embedding"),
        gradstore.capture(model, store, groups, layers="blocks"),
    ):
        pytest.fail("capturing began")


# -- the store -----------------------------------------------------------------------------------


def test_a_trainer_that_is_resumed(store: Store, tmp_path: Path) -> None:
    data = rows(samples(8))
    options: dict[str, Any] = {"epochs_captured": "all", "layers": ("*.c_fc", "*.0.*")}
    arguments: dict[str, Any] = {"save_strategy": "epoch", "activation_checkpointing": True}

    class Stop(Exception): ...

    class Interrupt(gradstore.capture.trainer.TrainerCallback):  # type: ignore[name-defined,misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                raise Stop

    collator = IdCollator(collate())
    with pytest.raises(Stop):
        train(
            tiny(), data, GradStoreCallback(store, **options), tmp_path, collator=collator,
            num_train_epochs=2, watch=[Interrupt()], **arguments,
        )  # fmt: skip
    names = [layer.layer for layer in store.layers(1)]
    assert len(names) == 5
    for other, said in (((), "go on with layers='transf"), ("blocks", "captured other layers")):
        with pytest.raises(CaptureError, match=said):
            train(
                tiny(), data, GradStoreCallback(store, layers=other), tmp_path, resume=True,
                collator=collator, num_train_epochs=2, **arguments,
            )  # fmt: skip
    model = tiny()
    witness, _ = train(
        model, data, GradStoreCallback(store, **options), tmp_path, resume=True,
        collator=collator, num_train_epochs=2, **arguments,
    )  # fmt: skip
    store = Store.open(store.root)
    assert [layer.layer for layer in store.layers(1)] == names
    assert store.rows("SELECT count(*), count(DISTINCT layer) FROM layers") == [(5, 5)]
    assert store.rows("SELECT count(*) FROM exposures") == [(16,)]
    second = witness.before[4]  # the weights before the first step of the second epoch
    last = {
        name: found[-1] for name, found in records(store).items() if found[-1].exposure.step == 4
    }
    assert last
    for name, record in last.items():
        truth = own_gradients("gpt2", True, second, dict(samples(8))[name], 0)
        assert_close(of_blocks(store, record), truth)
    kept = store.moments(1, "transformer.h.1.mlp.c_fc.bias", "end")
    assert kept is not None
    assert (kept[0].shape, kept[1]) == ((64,), 6)
    assert store.moments(1, "transformer.h.0.attn.c_attn.weight", "end") is not None
    assert store.moments(1, "transformer.h.1.attn.c_attn.weight", "end") is None


def test_a_catalog_is_made_again_from_the_manifests(store: Store) -> None:
    model = tiny()
    optimizer = sgd(model)
    with gradstore.capture(model, store, optimizer, layers="*.c_fc"):
        take_step(model, optimizer, batch_of(samples(3)))
    before = records(store)
    for path in [store.root / "catalog.duckdb", *store.root.glob("published/*")]:
        path.unlink()
    again = Store.open(store.root)
    after = records(again)
    assert after.keys() == before.keys()
    for name in after:
        assert_equal(after[name][0], before[name][0])
        for layer, factors in after[name][0].layers.items():
            assert torch.equal(factors.A, before[name][0].layers[layer].A)
            assert torch.equal(factors.B, before[name][0].layers[layer].B)
    assert len(again.layers(1)) == 2
