"""A forecast is a second-order expansion; a request keeps it beside what was measured."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from tiny import Tiny
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from gradstore import Store
from gradstore.evaluate.loss import sample_losses
from gradstore.influence import predictions
from gradstore.unlearn.forecast import Forecast, forecast
from gradstore.unlearn.forget import ForgetSettings, forget

pytest_plugins = ["tiny"]


def derivatives(network: nn.Module, weight: nn.Parameter, u: Tensor, tokens: Tensor) -> list[float]:
    """Loss, ⟨∇ℓ, u⟩ and uᵀ∇²ℓ u of one sample by double backward."""
    with sdpa_kernel(SDPBackend.MATH):
        loss = cross_entropy(network(input_ids=tokens[None]).logits[0, :-1], tokens[1:])
        [slope] = grad(loss, weight, create_graph=True)
        along = (slope * u).sum()
        [product] = grad(along, weight)
    return [float(each.detach()) for each in (loss, along, (product * u).sum())]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("entries", [1, 2**25])
def test_it_holds_every_samples_derivatives_along_the_update(
    kind: str, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "ENTRIES", entries)
    network = models.tiny(kind).double()
    network.train()
    weight = network.get_input_embeddings().weight
    [name] = [n for n, each in network.named_parameters() if each is weight]
    u = torch.randn_like(weight).detach()
    samples = [*models.samples(4).values(), torch.tensor([3, 5])]
    found = forecast(network, {name: u}, samples)
    expected = torch.tensor([derivatives(network, weight, u, tokens) for tokens in samples])
    loss, slope, curved = expected.T
    assert torch.allclose(found.loss, loss, rtol=1e-6)
    assert torch.allclose(found.slope, slope, rtol=1e-3)
    assert torch.allclose(found.curvature, curved, rtol=1e-3, atol=1e-3 * curved.abs().max())
    assert network.training
    assert torch.allclose(found.of([2, 0]).at(0.5), found.at(0.5)[[2, 0]])
    small = found.at(1e-3)
    with torch.no_grad():
        weight.add_(u, alpha=1e-3)
    assert torch.allclose(sample_losses(network, samples).float(), small, rtol=1e-5)


@pytest.mark.parametrize("loss", [1.0, 3.0])
def test_the_dose_that_meets_a_target(loss: float) -> None:
    def of(slope: float, curved: float) -> Forecast:
        return Forecast(*(torch.tensor([x - 1, x + 1]) for x in (loss, slope, curved)))

    for slope, curved in ((2.0, 0.0), (2.0, 3.0), (2.0, -0.5), (-1.0, 4.0), (0.0, 1.0)):
        line = of(slope, curved)
        dose = line.dose_for(loss + 1.5)
        assert dose is not None
        assert dose > 0
        assert float(line.at(dose).mean()) == pytest.approx(loss + 1.5)
    assert of(2.0, 3.0).dose_for(loss) is None  # is met already
    assert of(2.0, -2.0).dose_for(loss + 1.5) is None  # turns back before
    assert of(-1.0, 0.0).dose_for(loss + 1.5) is None


def test_a_request_keeps_what_was_foretold(copied: Tiny, tmp_path: Path) -> None:
    settings = ForgetSettings(direction="applied", dose="0.1", max_holdout_increase=None)
    with Store.open(copied.store) as store:
        outcome = forget(store, ["p-07"], copied.model, tmp_path / "out", settings)
        path = store.rows("SELECT dose, forget_loss, forecast_loss FROM paths ORDER BY dose")
        assert [(p.dose, p.forget, p.forecast) for p in outcome.path] == path
        for dose, measured, foretold in path:
            assert foretold == pytest.approx(measured, rel=0.01 if dose else 1e-6)
        ledger = store.rows("SELECT id, role, rise, forecast_rise FROM ledger")
        stays = {(s.id, s.role): s for s in outcome.scores if s.role != "forget"}
        assert {row[:2] for row in ledger} == stays.keys()
        rises = [row[2] for row in ledger]
        assert rises == sorted(rises, reverse=True)
        assert sum(abs(r - f) for *_, r, f in ledger) < 0.1 * sum(map(abs, rises))
        [(target, way)] = store.rows("SELECT target, way FROM forgotten")
        assert target == outcome.scores[0].target
        score = outcome.scores[0]
        assert way == pytest.approx((score.after - score.before) / (target - score.before))


def test_where_the_loss_rose_token_by_token(copied: Tiny, tmp_path: Path) -> None:
    settings = ForgetSettings(max_holdout_increase=None)
    with Store.open(copied.store) as store:
        outcome = forget(store, ["p-11", "p-07"], copied.model, tmp_path / "out", settings)
        tokens = store.table(
            "SELECT * FROM token_losses JOIN samples USING (sample_id) ORDER BY position"
        )
        for score in (s for s in outcome.scores if s.role == "forget"):
            mine = [row for row in tokens if row["id"] == score.id]
            count = len(mine)
            assert [row["position"] for row in mine] == list(range(1, count + 1))
            assert mine[0]["tokens"] == count + 1
            for moment in ("before", "after"):
                mean = sum(row[moment] for row in mine) / count
                assert mean == pytest.approx(getattr(score, moment), rel=1e-5)
            [(first,)] = store.rows(
                "SELECT loss FROM gradients WHERE id = ? ORDER BY epoch LIMIT 1", [score.id]
            )
            assert sum(row["first_met"] for row in mine) / count == pytest.approx(first, rel=0.01)


def test_the_estimate_does_not_depend_on_what_it_judges(trained: Tiny, tmp_path: Path) -> None:
    with Store.open(trained.store) as store:
        targets = {
            kind: forget(
                store, ["p-07", "p-11"], trained.model, tmp_path / "out",
                ForgetSettings(direction=kind), dry_run=True,
            ).target
            for kind in ("applied", "newton", "orthogonal", "raw", "fresh")
        }  # fmt: skip
    assert targets["applied"] is not None
    assert targets["applied"].source == "undo"
    for target in targets.values():  # batches of other samples round otherwise
        assert target is not None
        assert target.source == "undo"
        assert target.each == pytest.approx(targets["applied"].each, rel=1e-5)


def test_one_epoch_of_several_is_not_taken_for_the_whole(trained: Tiny, tmp_path: Path) -> None:
    with Store.open(trained.store) as store:
        verdicts = [
            forget(
                store, ["p-07"], trained.model, tmp_path / "out",
                ForgetSettings(direction="applied", epochs=epochs), dry_run=True,
            ).verdict
            for epochs in (None, "1")
        ]  # fmt: skip
    assert verdicts == ["forgotten", "partly"]
