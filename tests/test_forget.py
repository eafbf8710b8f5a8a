"""Directions are the formulas they claim to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from statistics import fmean
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file
from tiny import Tiny
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import get_linear_schedule_with_warmup

from gradstore import GradStoreCallback, Store, capture
from gradstore.errors import ForgetError, SettingsError
from gradstore.influence.curvature import GaussNewton
from gradstore.store.record import Record
from gradstore.training.ingest import TrainingSettings, train
from gradstore.training.model import load_model
from gradstore.unlearn.applied import PULL, WEIGHTS, applied, orthogonal
from gradstore.unlearn.direction import raw
from gradstore.unlearn.find import find
from gradstore.unlearn.forget import ForgetSettings, forget
from gradstore.unlearn.held import Held
from gradstore.unlearn.newton import HOLD, newton

pytest_plugins = ["tiny"]
IDS = ["p-07", "p-11", "p-02"]


# -- directions --------------------------------------------------------------------------------


def dense(record: Record, vocabulary: int) -> Tensor:
    """A record's gradient of a tied embedding, from its factors, entry by entry."""
    gradient = torch.zeros(vocabulary, record.D.shape[1])
    for token, row in zip(record.tokens[:-1].tolist(), record.D.float(), strict=True):
        gradient[token] += row
    if (side := record.output) is not None:
        residual = side.tail_mass.float()[:, None] * side.tail.float()[None]
        for position, label in enumerate(record.tokens[1:].tolist()):
            residual[position, label] += side.label[position].float()
            kept = zip(side.index[position].tolist(), side.value[position].float(), strict=True)
            for entry, value in kept:
                residual[position, entry] += value
        gradient += residual.T @ side.H.float()
    return gradient


def facts(store: Store, sample: str, epoch: int) -> dict[str, Any]:
    [row] = store.table(
        "SELECT * FROM exposures JOIN samples USING (sample_id) WHERE id = ? AND epoch = ?",
        [sample, epoch],
    )
    return row


def applied_by_hand(store: Store, numbers: list[int], weights: str) -> Tensor:
    """The formula of the docstring, an exposure and an entry at a time."""
    run = store.run()
    kept = store.moments(run["run_id"], "embedding", "end")
    assert kept is not None
    assert (kept[1], run["beta2"], run["epsilon"]) == (12, 0.999, 1e-8)
    root = (kept[0].double() / (1 - 0.999**12)).sqrt()
    rates = dict(store.rows("SELECT step, learning_rate FROM steps ORDER BY step"))
    assert list(rates) == list(range(1, 13))
    expected = torch.zeros(store.model.vocabulary, store.model.width, dtype=torch.float64)
    for record in store.records(numbers, run["run_id"]):
        fact = facts(store, record.exposure.id, record.exposure.epoch)
        assert fact["learning_rate"] == rates[fact["step"]]
        assert fact["batch_share"] == pytest.approx(1 / (4 * 12), rel=1e-4)  # tokens of a batch
        share = fact["batch_share"] * fact["grad_scale"]
        after = sum(rate for step, rate in rates.items() if step > fact["step"])
        weight = {
            "uniform": torch.ones(()),
            "rising": torch.tensor(fact["epoch"] / 1.5),
            "washed": 1 / (1 + PULL * after * root / share),
        }[weights]
        gradient = dense(record, store.model.vocabulary).double()
        expected += weight * fact["learning_rate"] * share * gradient / (root + 1e-8)
    return expected


@pytest.mark.parametrize("weights", WEIGHTS)
def test_applied_is_the_sum_of_what_adam_did(weights: str, trained: Tiny) -> None:
    store = Store.open(trained.store)
    for someone in IDS:
        numbers = list(store.resolve([someone]).values())
        found = applied(store, store.run(), numbers, weights)
        assert (found.kind, found.exposures) == ("applied", 2)
        assert found.dose == (1.0 if weights == "washed" else 0.5)
        expected = applied_by_hand(store, numbers, weights)
        assert models.relative(found.update.double(), expected) < 1e-5


def test_a_set_is_undone_epoch_by_epoch(trained: Tiny) -> None:
    store = Store.open(trained.store)
    numbers = list(store.resolve(IDS).values())
    found = applied(store, store.run(), numbers)
    assert found.exposures == 6
    expected = applied_by_hand(store, numbers, "washed")  # with the mean of an epoch's pulls
    assert models.relative(found.update.double(), expected) < 0.1
    exact = applied(store, store.run(), numbers, "rising")
    assert models.relative(exact.update.double(), applied_by_hand(store, numbers, "rising")) < 1e-5


def test_raw_is_the_sum_of_first_epoch_gradients(trained: Tiny) -> None:
    store = Store.open(trained.store)
    run, numbers = store.run(), list(store.resolve(IDS).values())
    firsts = [r for r in store.records(numbers, run["run_id"]) if r.exposure.epoch == 1]
    expected = sum((dense(record, store.model.vocabulary) for record in firsts), torch.zeros(()))
    found = raw(store, run, numbers)
    assert (found.kind, found.dose, found.exposures) == ("raw", None, 3)
    assert models.relative(found.update, expected) < 1e-5


@pytest.mark.parametrize("epochs", ["2", "all", "every:2"])
def test_chosen_epochs_are_summed(epochs: str, trained: Tiny) -> None:
    store = Store.open(trained.store)
    run, numbers = store.run(), list(store.resolve(IDS).values())
    wanted = {1, 2} if epochs == "all" else {2}
    expected = torch.zeros(store.model.vocabulary, store.model.width)
    for record in store.records(numbers, run["run_id"]):
        if record.exposure.epoch in wanted:
            expected += dense(record, store.model.vocabulary)
    found = raw(store, run, numbers, epochs=epochs)
    assert found.exposures == 3 * len(wanted)
    assert models.relative(found.update, expected) < 1e-5
    part = applied(store, run, numbers, "uniform", epochs=epochs)
    other = applied(store, run, numbers, "uniform", epochs="1")
    whole = applied(store, run, numbers, "uniform").update
    both = part.update if epochs == "all" else part.update + other.update
    assert models.relative(both, whole) < 1e-5
    with pytest.raises(ForgetError, match=r"no gradient in run-1 of --epochs 7: .*gradstore show"):
        raw(store, run, numbers, epochs="7")
    with pytest.raises(
        SettingsError, match="--epochs belongs to directions of stored gradients, not fresh"
    ):
        find(
            "fresh", store, run, numbers, load_model(trained.model),
            weights=None, seed=0, epochs="1",
        )  # fmt: skip


def of_step(store: Store, step: int) -> float:
    """What a step's loss was in units of a mean over tokens, times how large gradients were."""
    [(epoch,)] = store.rows("SELECT epoch FROM steps WHERE step = ?", [step])
    of = store.table("FROM exposures WHERE epoch = ?", [epoch])
    last = store.table("FROM exposures WHERE epoch = 2")
    tokens = sum(e["batch_share"] * e["grad_scale"] * e["scored_tokens"] for e in of)
    size, now = (fmean(e["d_norm"] ** 2 for e in exposures) for exposures in (of, last))
    return float(tokens / len({e["step"] for e in of}) * size / now)


def test_newton_solves_for_where_what_stays_leads(trained: Tiny) -> None:
    store, network = Store.open(trained.store), load_model(trained.model)
    run, numbers = store.run(), list(store.resolve(IDS).values())
    others = store.resolve(["p-01", "p-03", "p-04"])
    retained = list(store.tokens(list(others.values()), run["run_id"]).values())
    found = newton(store, run, numbers, network, Held(others=list(others.values())))
    assert (found.kind, found.dose, found.exposures) == ("newton", 1.0, 6)
    kept = store.moments(run["run_id"], "embedding", "end")
    assert kept is not None
    scale = (kept[0] / (1 - 0.999**12)).sqrt() + 1e-8
    rates = dict(store.rows("SELECT step, learning_rate FROM steps"))
    firm = {at: sum(r * of_step(store, s) for s, r in rates.items() if s > at) for at in rates}
    records = list(store.records(numbers, run["run_id"]))
    own = [(record.exposure.learning_rate, firm[record.exposure.step]) for record in records]
    c = sum(rate * of for rate, of in own) / sum(rate for rate, _ in own)
    steps = torch.zeros_like(scale)
    for record in records:
        met = record.exposure
        rate = met.learning_rate * 2 * math.exp(-firm[met.step] / c)
        steps += rate * met.batch_share * met.grad_scale * dense(record, store.model.vocabulary)
    c *= HOLD
    missing = scale * found.update + c * GaussNewton(network, retained)(found.update) - steps
    norm = float((missing**2 / scale).sum() / (steps**2 / scale).sum()) ** 0.5
    assert norm < 0.2  # the residual that a dozen iterations leave
    assert 0.05 < models.relative(found.update, steps / scale) < 1


def test_orthogonal_moves_no_loss_of_those_that_hold_it(trained: Tiny) -> None:
    store = Store.open(trained.store)
    run, numbers = store.run(), list(store.resolve(IDS).values())
    others = list(store.resolve(["p-01", "p-03", "p-04", "p-01"]).values())
    found = orthogonal(store, run, numbers, others)
    start = applied(store, run, numbers)
    assert (found.kind, found.dose, found.exposures) == ("orthogonal", 1.0, 6)
    last = [record for record in store.records(others, run["run_id"]) if record.exposure.epoch == 2]
    assert len(last) == 3
    for record in last:
        gradient = dense(record, store.model.vocabulary)
        along = float((gradient * found.update).sum())
        before = float((gradient * start.update).sum())
        assert abs(along) < 1e-3 * abs(before)
    kept = store.moments(run["run_id"], "embedding", "end")
    assert kept is not None
    taken = (start.update - found.update) * ((kept[0] / (1 - 0.999**12)).sqrt() + 1e-8)
    basis = torch.stack([dense(r, store.model.vocabulary).flatten() for r in last]).T
    rest = taken.flatten() - basis @ torch.linalg.lstsq(basis, taken.flatten()).solution
    assert float(rest.norm()) < 1e-3 * float(taken.norm())  # and nothing but their part went


def test_a_catalog_from_before_steps_were_kept(
    trained: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(trained.store)
    run, numbers = store.run(), list(store.resolve(IDS).values())
    expected = applied(store, run, numbers, "rising").update
    monkeypatch.setattr(store, "has", lambda table: table != "steps")
    assert torch.equal(applied(store, run, numbers, "rising").update, expected)
    with pytest.raises(ForgetError, match="kept no list of its steps.*--weights rising"):
        applied(store, run, numbers)
    with pytest.raises(ForgetError, match="kept no list of its steps.*--weights rising"):
        newton(store, run, numbers, load_model(trained.model), Held(others=numbers))
    with pytest.raises(ForgetError, match="kept no list of its steps.*--from-checkpoints out"):
        applied(store, run, numbers, "rising", [trained.model])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_moments_that_have_faded_do_not_undo_more_than_adam_did(
    weights: str, trained: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, network = Store.open(trained.store), load_model(trained.model)
    run, numbers = store.run(), list(store.resolve(IDS).values())
    kept = store.moments(run["run_id"], "embedding", "end")
    assert kept is not None
    monkeypatch.setattr(store, "moments", lambda *_: (torch.zeros_like(kept[0]), kept[1]))
    found = applied(store, run, numbers, weights)
    rates = store.rows("SELECT learning_rate FROM gradients WHERE list_contains(?, id)", [IDS])
    most = sum(rate for (rate,) in rates) / (1 - 0.999) ** 0.5  # the longest step Adam can take
    assert 0 < float(found.update.abs().max()) <= most * 4 / 3 * (1 + 1e-6)
    stay = list(store.resolve(["p-01"]).values())
    assert torch.isfinite(newton(store, run, numbers, network, Held(others=stay)).update).all()


def looped(
    store: Store, optimizer: Callable[[Any], torch.optim.Optimizer], stop: int | None = None
) -> tuple[Tensor, Tensor]:
    """Train a tiny model in a plain loop for an epoch; returns its embedding before and after."""
    model, tokens = models.tiny(), models.samples(12)
    weight = model.get_input_embeddings().weight
    before, ids = weight.detach().clone(), list(tokens)
    steps = optimizer(model.parameters())
    pad = models.collate()
    with capture(model, store, steps, sides="both", top_k=models.VOCABULARY) as recorder:
        for _ in recorder.epochs(1):
            for start in range(0, len(ids), 4):
                batch = ids[start : start + 4]
                given_ids = [{"input_ids": tokens[i]} for i in batch]
                model(**pad(given_ids), sample_ids=batch).loss.backward()
                steps.step()
                steps.zero_grad()
                if start == stop:
                    raise KeyboardInterrupt
    return before, weight.detach()


def test_applied_with_weight_one_undoes_sgd(store: Store) -> None:
    before, after = looped(store, lambda parameters: torch.optim.SGD(parameters, lr=0.01))
    everyone = list(store.resolve(models.samples(12)).values())
    found = applied(store, store.run(), everyone, "uniform")
    assert models.relative(found.update, before - after) < 1e-4
    by_default = applied(store, store.run(), everyone)
    assert by_default.dose == 0.5
    assert torch.equal(by_default.update, applied(store, store.run(), everyone, "rising").update)
    with pytest.raises(ForgetError, match="'wash' are no weights; give one of washed, rising"):
        applied(store, store.run(), everyone, "wash")
    with pytest.raises(ForgetError, match="SGD keeps no second moments"):
        applied(store, store.run(), everyone, "washed")


def test_what_is_not_known_is_refused(store: Store, trained: Tiny) -> None:
    with pytest.raises(KeyboardInterrupt):
        looped(store, torch.optim.AdamW, stop=4)
    someone = list(store.resolve(["sample-2"]).values())
    with pytest.raises(ForgetError, match=r"run-1 kept no second moments of AdamW .* raw$"):
        applied(store, store.run(), someone)
    looped(store, torch.optim.Adagrad)
    with pytest.raises(ForgetError, match="run-2 kept no second moments of Adagrad"):
        applied(store, store.run(), someone)
    assert float(raw(store, store.run(), someone).update.norm()) > 0
    full = Store.open(trained.store)
    with pytest.raises(ForgetError, match="'h-01' has no gradient in run-1: it was held out"):
        raw(full, full.run(), list(full.resolve(["p-01", "h-01"]).values()))


def test_the_new_checkpoint_is_the_old_one_plus_dose_times_direction(
    copied: Tiny, tmp_path: Path
) -> None:
    store, name = Store.open(copied.store), "transformer.wte.weight"
    settings = ForgetSettings(dose="3", weights="uniform", max_holdout_increase=None)
    outcome = forget(store, IDS, copied.model, tmp_path / "out", settings)
    numbers = list(store.resolve(IDS).values())
    update = applied(store, store.run(), numbers, "uniform").update
    old, new = (
        load_file(folder / "model.safetensors")[name] for folder in (copied.model, tmp_path / "out")
    )
    assert models.relative(new - old, 3 * update) < 1e-4
    assert [score.id for score in outcome.scores if score.role == "forget"] == IDS


# -- the reference: training without a sample ---------------------------------------------------

SETTINGS = TrainingSettings(epochs=1, batch_size=2, accumulate=2, learning_rate=0.01)


def exposures(store: Store) -> dict[str, tuple[int, float, float]]:
    rows = store.rows("SELECT id, step, batch_share, learning_rate FROM gradients ORDER BY id")
    return {sample: tuple(rest) for sample, *rest in rows}


def by_hand(tokens: dict[str, Tensor], steps: dict[str, int], left_out: Collection[str]) -> Any:
    """The same training, a sample at a time, each left out subtracted again from its batch."""
    model = models.tiny().double()
    count = max(steps.values())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, count)
    for step in range(1, count + 1):
        batch = [sample for sample in tokens if steps[sample] == step]
        total = sum(len(tokens[sample]) for sample in batch)  # as transformers counts
        losses = {
            sample: cross_entropy(
                model(input_ids=tokens[sample][None]).logits[0, :-1], tokens[sample][1:],
                reduction="sum",
            )
            for sample in batch
        }  # fmt: skip
        loss = torch.stack([*losses.values()]).sum()
        loss = loss - sum(losses[sample] for sample in batch if sample in left_out)
        (loss / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("left_out", [(), ("sample-3",), ("sample-0", "sample-9", "sample-4")])
def test_training_without_samples_subtracts_their_part_and_no_more(
    left_out: tuple[str, ...], tmp_path: Path
) -> None:
    tokens = models.samples(15)
    found = {}
    for name, without in (("whole", ()), ("part", left_out)):
        # double: where a gradient is zero but for rounding, Adam makes full steps of the rounding
        model, store = models.tiny().double(), Store.create(tmp_path / name)
        with GradStoreCallback(store) as callback:
            train(model, tokens, tmp_path / "out", SETTINGS, [callback], without=without)
        found[name] = model, exposures(store)
    (_, whole), (model, part) = found["whole"], found["part"]
    assert whole.keys() == tokens.keys()
    assert part.keys() == tokens.keys() - set(left_out)
    for sample, (step, share, rate) in part.items():  # the same batches, shares and rates
        assert (step, rate) == (whole[sample][0], whole[sample][2])
        assert share == pytest.approx(whole[sample][1], rel=1e-4)
    expected = by_hand(tokens, {sample: fact[0] for sample, fact in whole.items()}, left_out)
    for (name, weight), truth in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.allclose(weight, truth, rtol=0, atol=1e-6), name  # losses are taken in float32


# -- exposures that were not captured ------------------------------------------------------------


@pytest.mark.parametrize("epochs", ["first", "2", "all"])
def test_checkpoints_complete_what_was_not_captured(epochs: str, tmp_path: Path) -> None:
    tokens, out = models.samples(8), tmp_path / "out"
    settings = TrainingSettings(epochs=3, batch_size=4, learning_rate=1e-3, save_checkpoints=True)
    stores = {}
    for name, captured in (("whole", "all"), ("part", epochs)):
        model, stores[name] = models.tiny(), Store.create(tmp_path / name)
        options: dict[str, Any] = {"epochs_captured": captured, "top_k": models.VOCABULARY}
        with GradStoreCallback(stores[name], **options) as callback:
            train(model, tokens, out / name, settings, [callback])
    saved = sorted((out / "part" / "checkpoints").glob("checkpoint-*"))
    assert [path.name for path in saved] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for weights in WEIGHTS:
        found = {}
        for name, store in stores.items():
            numbers = list(store.resolve(["sample-3", "sample-5"]).values())
            given = saved if name == "part" else ()
            found[name] = applied(store, store.run(), numbers, weights, given)
        assert found["whole"].exposures == found["part"].exposures == 6
        off = models.relative(found["part"].update, found["whole"].update)
        assert off < (1e-6 if epochs == "all" else 0.2)  # half an epoch of training apart
        alone = applied(stores["part"], stores["part"].run(), numbers, weights)
        if epochs != "all":
            assert models.relative(alone.update, found["whole"].update) > 2 * off
    with pytest.raises(ForgetError, match=r"is no checkpoint of a Trainer \(trainer_state.json"):
        applied(store, store.run(), numbers, None, [tmp_path])
