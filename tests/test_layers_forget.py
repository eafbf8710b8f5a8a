"""Forgetting moves the captured layers that were asked for, each by its own history."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    batch_of,
    records,
    relative,
    samples,
    sgd,
    snapshot,
    take_step,
    tiny,
)
from safetensors import safe_open
from test_layers import BLOCKS, H, of_blocks
from tiny import FRESH, Tiny, files, refused, run, run_json
from torch import Tensor
from torch.nn.functional import cosine_similarity

import gradstore
from gradstore import GradStoreCallback, Store
from gradstore.capture.layers import parameter
from gradstore.errors import ForgetError
from gradstore.evaluate.loss import sample_losses
from gradstore.influence.curvature import GaussNewton
from gradstore.influence.predictions import flat, parts
from gradstore.training.ingest import TrainingSettings, train
from gradstore.training.model import load_model
from gradstore.unlearn.applied import applied
from gradstore.unlearn.exposures import layers_of, stored
from gradstore.unlearn.find import find
from gradstore.unlearn.firmness import held_after
from gradstore.unlearn.further import MOST, further
from gradstore.unlearn.held import Held
from gradstore.unlearn.newton import FURTHER, newton

pytest_plugins = ["tiny"]


@pytest.mark.parametrize(("kind", "tied"), [("gpt2", True), ("llama", False)])
def test_one_step_of_sgd_is_undone(kind: str, tied: bool, store: Store) -> None:
    model, tokens = tiny(kind, tied=tied), samples(3)
    before, optimizer = snapshot(model), sgd(model)
    with gradstore.capture(model, store, optimizer, epochs_captured="all", **BLOCKS) as recorder:
        for _ in recorder.epochs(1):
            take_step(model, optimizer, batch_of(tokens))
    numbers = list(store.resolve(list(tokens)).values())
    names = layers_of(store, store.run(), ["all"])
    found = applied(store, store.run(), numbers, "uniform", layers=names)
    expected = {"embedding", "position"} if kind == "gpt2" else {"embedding", "head"}
    assert found.updates.keys() > expected
    for name, update in found.updates.items():
        weight = parameter(model, name)
        own = next(n for n, p in model.named_parameters() if p is weight)
        step = before[own] - weight.detach()
        assert float((update.view(step.shape) - step).norm()) <= 1e-4 * step.norm() + 1e-6, name


def test_raw_of_all_layers_is_the_sum_of_first_gradients(store: Store) -> None:
    model, tokens = tiny(), samples(4)
    optimizer = sgd(model)
    with gradstore.capture(model, store, optimizer, epochs_captured="all", **BLOCKS) as recorder:
        for _ in recorder.epochs(2):
            take_step(model, optimizer, batch_of(tokens))
    ids = list(tokens)[:2]
    expected: dict[str, Tensor] = {}
    for sample in ids:
        first = records(store)[sample][0]
        parts = of_blocks(store, first) | {
            "embedding": first.gradient(store.model).dense(),
            "position": first.gradient(store.model, "position").dense(),
        }
        for name, part in parts.items():
            expected[name] = expected.get(name, torch.zeros(())) + part
    numbers = list(store.resolve(ids).values())
    found = find("raw", store, store.run(), numbers, model, weights=None, seed=0, layers=["all"])
    assert found.updates.keys() == expected.keys()
    for name, update in found.updates.items():
        assert torch.allclose(update.view_as(expected[name]), expected[name], atol=1e-5), name


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny ingest with layers, through the command line."""
    made = files(tmp_path_factory.mktemp("layered"))
    run("init", made.store)
    run(
        "ingest", made.data, "-s", made.store, "--config", made.config, *FRESH,
        "--holdout", made.holdout, "--out", made.model, "--layers", "*.mlp.c_fc,*.0.attn.*",
        "--layers", "transformer.h.1.mlp.c_proj",
    )  # fmt: skip
    return made


def test_applied_divides_each_layer_by_its_own_moments(layered: Tiny) -> None:
    store = Store.open(layered.store)
    run_, numbers = store.run(), list(store.resolve(["p-07"]).values())
    name = "transformer.h.0.mlp.c_fc"
    found = applied(store, run_, numbers, "uniform", layers=[name])
    assert found.updates.keys() == {f"{name}.weight", f"{name}.bias"}
    for kind in ("weight", "bias"):
        kept = store.moments(run_["run_id"], f"{name}.{kind}", "end")
        assert kept is not None
        root = (kept[0] / (1 - run_["beta2"] ** kept[1])).sqrt()
        expected = torch.zeros_like(root)
        for record in store.records(numbers, run_["run_id"]):
            met, factors = record.exposure, record.layers[name]
            dense = factors.A.float().T @ factors.B.float()
            step = (dense if kind == "weight" else factors.B.float().sum(0)) * (
                met.batch_share * met.grad_scale
            )
            floor = step.abs() * (1 - run_["beta2"]) ** 0.5
            expected += met.learning_rate * step / (torch.maximum(root, floor) + run_["epsilon"])
        assert relative(found.updates[f"{name}.{kind}"].view_as(root), expected) < 1e-4


def test_newton_solves_for_all_layers_together(
    layered: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstore.unlearn.newton.further", lambda *_: 1.0)
    store, network = Store.open(layered.store), load_model(layered.model)
    run_, numbers = store.run(), list(store.resolve(["p-07"]).values())
    stay = list(store.resolve(["p-01", "p-03", "p-05"]).values())
    names = layers_of(store, run_, ["all"])
    found = newton(store, run_, numbers, network, Held(others=stay), layers=names)
    held = held_after(store, run_)
    own = store.rows("SELECT learning_rate, step FROM gradients WHERE id = 'p-07'")
    c = sum(rate * held[step] for rate, step in own) / sum(rate for rate, _ in own)
    steps = {name: torch.zeros_like(update) for name, update in found.updates.items()}
    for met in stored(store, run_, numbers, names):
        rate = met.learning_rate * 2 * math.exp(-held[met.steps[0]] / c)
        for name, gradient in met.gradients.items():
            gradient.add_to(steps[name], met.share * rate)
    retained = list(store.tokens(stay, run_["run_id"]).values())
    image = parts(GaussNewton(network, retained, steps)(flat(found.updates)), steps)
    left = whole = 0.0
    for name, step in steps.items():
        kept = store.moments(run_["run_id"], name, "end")
        assert kept is not None
        scale = (kept[0] / (1 - run_["beta2"] ** kept[1])).sqrt().view(step.shape) + 1e-8
        assert image[name].any()
        missing = scale * found.updates[name] - step + c * image[name]
        left += float((missing**2 / scale).sum())
        whole += float((step**2 / scale).sum())
    assert left**0.5 < 0.2 * whole**0.5  # the residual that the iterations leave


def test_layers_are_taken_away_by_an_exclamation_mark(layered: Tiny) -> None:
    store = Store.open(layered.store)
    everything = layers_of(store, store.run(), ["all"])
    assert "position" in everything
    less = layers_of(store, store.run(), ["all", "!position", "!*.mlp.*"])
    assert less == [n for n in everything if n != "position" and ".mlp." not in n]
    assert layers_of(store, store.run(), "!blocks, !head") == ["embedding", "position"]
    with pytest.raises(ForgetError, match="captured no layer 'positon'"):
        layers_of(store, store.run(), "all,!positon")
    with pytest.raises(ForgetError, match="no layer is left to move"):
        layers_of(store, store.run(), ["position", "!pos*"])


def test_newton_of_all_layers_goes_on_until_the_loss_is_there(
    layered: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, network = Store.open(layered.store), load_model(layered.model)
    run_, numbers = store.run(), list(store.resolve(["p-07", "p-02"]).values())
    stay, names = list(store.resolve(["p-01", "p-03"]).values()), layers_of(store, run_, ["all"])
    texts = list(store.tokens(numbers, run_["run_id"]).values())
    before = {name: weight.clone() for name, weight in network.state_dict().items()}

    def at(updates: Mapping[str, Tensor]) -> float:
        moved = deepcopy(network)
        with torch.no_grad():
            for name, update in updates.items():
                weight = parameter(moved, name)
                weight.add_(update.view(weight.shape))
        return float(sample_losses(moved, texts).mean())

    def found() -> Mapping[str, Tensor]:
        held = Held(others=stay)
        return newton(store, run_, numbers, network, held, layers=names).updates

    gone_on = found()
    monkeypatch.setattr("gradstore.unlearn.newton.further", lambda *_: 1.0)
    one = found()
    start, reached, far = at({}), at(one), at(gone_on)
    assert far - start == pytest.approx(FURTHER * (reached - start), rel=0.02)
    multiple = gone_on["embedding"].norm() / one["embedding"].norm()
    assert 1 < multiple < MOST
    for name, update in one.items():
        assert torch.allclose(gone_on[name], update * multiple, rtol=1e-4, atol=1e-9)
    assert all(torch.equal(network.state_dict()[name], of) for name, of in before.items())
    backwards = {name: -update for name, update in one.items()}
    assert further(network, backwards, texts, FURTHER) == 1.0
    assert further(network, one, texts, 99.0) == MOST


def test_checkpoints_complete_all_layers(tmp_path: Path) -> None:
    tokens, found = samples(8), {}
    settings = TrainingSettings(epochs=3, batch_size=4, learning_rate=1e-3, save_checkpoints=True)
    for captured in ("all", "first"):
        model, store = tiny(), Store.create(tmp_path / captured)
        with GradStoreCallback(store, **(BLOCKS | {"epochs_captured": captured})) as callback:
            train(model, tokens, tmp_path / f"{captured}-out", settings, [callback])
        saved = sorted((tmp_path / f"{captured}-out" / "checkpoints").glob("checkpoint-*"))
        numbers, run_ = list(store.resolve(["sample-3", "sample-5"]).values()), store.run()
        names = layers_of(store, run_, ["all"])
        given = saved if captured == "first" else ()
        found[captured] = applied(store, run_, numbers, "uniform", given, names)
    assert found["all"].exposures == found["first"].exposures == 6
    assert found["all"].updates.keys() == found["first"].updates.keys()
    for name, whole in found["all"].updates.items():
        if not name.endswith("c_attn.bias"):  # no key's bias has a gradient, but for rounding
            completed = found["first"].updates[name]  # half an epoch of training apart
            assert cosine_similarity(completed.flatten(), whole.flatten(), dim=0) > 0.95, name


@pytest.mark.parametrize(
    ("direction", "asked", "moved"),
    [
        ("applied", (), ["transformer.wte.weight"]),
        ("raw", ("*.c_fc",), [f"{h}.mlp.c_fc.{p}" for h in H for p in ("bias", "weight")]),
        (
            "applied",
            (f"embedding,{H[1]}.mlp.c_proj",),
            [f"{H[1]}.mlp.c_proj.bias", f"{H[1]}.mlp.c_proj.weight", "transformer.wte.weight"],
        ),
    ],
)  # fmt: skip
def test_forgetting_with_layers_and_its_receipt(
    direction: str, asked: tuple[str, ...], moved: list[str], layered: Tiny, tmp_path: Path
) -> None:
    options: list[Any] = ["--direction", direction, "--max-holdout-increase", 9]
    options += [word for text in asked for word in ("--layers", text)]
    options += ["--dose", "target:7" if direction == "raw" else 3]
    command = ["forget", "p-07", "-s", layered.store, "--model", layered.model, *options]
    done = json.loads(run(*command, "--out", tmp_path / "out", "--json", code=None).stdout)
    [sample] = done["forgotten"]
    assert sample["loss_after"] > sample["loss_before"]
    before, after = (
        load_model(layered.model).state_dict(),
        load_model(tmp_path / "out").state_dict(),
    )
    changed = [n for n in before if n != "lm_head.weight" and not before[n].equal(after[n])]
    assert sorted(changed) == moved
    store = Store.open(layered.store)
    [(number, settings)] = store.rows(
        "SELECT request_id, settings FROM requests ORDER BY request_id DESC LIMIT 1"
    )
    assert json.loads(settings)["layers"] == (list(asked) or ["embedding"])
    checks = run_json("receipt", "verify", number, "-s", layered.store)
    assert {check["check"]: check["passed"] for check in checks}["recomputed"] is True
    assert all(check["passed"] for check in checks)


def test_newton_leaves_positions_unless_told_otherwise(layered: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("forget", "p-03", "p-05", "-s", layered.store, "--model", layered.model,
        "--max-holdout-increase", 9, "--out", out, code=None)  # fmt: skip
    before, after = load_model(layered.model).state_dict(), load_model(out).state_dict()
    assert before["transformer.wpe.weight"].equal(after["transformer.wpe.weight"])
    assert sum(not before[name].equal(after[name]) for name in before) == 2 + 2 * 5
    [request] = Store.open(layered.store).table("FROM requests ORDER BY request_id DESC LIMIT 1")
    assert request["direction"] == "newton"
    assert json.loads(request["settings"])["layers"] == ["all", "!position"]


def test_all_layers_move_at_once(layered: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["forget", "p-03", "p-05", "-s", layered.store, "--model", layered.model,
               "--layers", "all", "--max-holdout-increase", 9, "--out", out]  # fmt: skip
    run(*command, "--dry-run", code=None)
    assert not out.exists()
    run(*command, code=None)
    before, after = load_model(layered.model).state_dict(), load_model(out).state_dict()
    changed = {n for n in before if not before[n].equal(after[n])}
    assert {"transformer.wte.weight", "transformer.wpe.weight"} < changed
    assert len(changed) == 3 + 2 * 5
    [request] = Store.open(layered.store).table("FROM requests ORDER BY request_id DESC LIMIT 1")
    assert request["direction"] == "newton"


def test_an_export_holds_the_layers(layered: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "one.safetensors"
    run("export", "--gradients", "p-07", out, "-s", layered.store, "--dense")
    with safe_open(out, "pt") as file:
        names = set(file.keys())
        store = Store.open(layered.store)
        first = next(iter(store.records(list(store.resolve(["p-07"]).values()), 1)))
        assert first.layers
        for name, factors in first.layers.items():
            assert torch.equal(file.get_tensor(f"0/layers/{name}/A"), factors.A)
            assert torch.equal(file.get_tensor(f"0/layers/{name}/B"), factors.B)
            dense = factors.weight().dense()
            assert torch.allclose(file.get_tensor(f"0/dense/{name}"), dense)
    assert {"0/D", "0/H", "0/dense/embedding"} <= names


def test_what_cannot_be_forgotten_with(layered: Tiny, trained: Tiny, tmp_path: Path) -> None:
    def said(tiny: Tiny, *options: object, code: int = 1) -> str:
        out = tmp_path / "out"
        return refused("forget", "p-07", "-s", tiny.store, "--model", tiny.model,
                       "--out", out, *options, code=code)  # fmt: skip

    for direction in ("orthogonal", "random"):
        error = said(layered, "--layers", "blocks", "--direction", direction, code=2)
        assert f"--direction {direction} moves the embedding only" in error
    assert "captured no layer '*.q_proj'; it has embedding, " in said(
        layered, "--layers", "*.q_proj"
    )
    assert "captured no layer 'blocks'" in said(trained, "--layers", "blocks")
    usage = run("forget", "p-07", "-s", layered.store, "--model", layered.model,
                "--out", tmp_path / "out", "--exact", "--layers", "all", code=2)  # fmt: skip
    assert "--layers" in usage.stderr


def test_ingest_refuses_layers_that_are_not_there(layered: Tiny, tmp_path: Path) -> None:
    error = refused(
        "ingest", layered.data, "-s", layered.store, "--model", layered.model,
        "--out", tmp_path / "new", "--layers", "*.q_proj", "--dry-run",
    )  # fmt: skip
    assert "no trained linear layer is named '*.q_proj'" in error
