"""Directions are the formulas they claim to be; a path's dose is the one its docstring promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import Tiny
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import get_linear_schedule_with_warmup

from gradstore import GradStoreCallback, Store, capture
from gradstore.errors import ForgetError
from gradstore.store.record import Record
from gradstore.training.ingest import TrainingSettings, train
from gradstore.training.model import load_model
from gradstore.unlearn import direction as directions
from gradstore.unlearn.curvature import GaussNewton
from gradstore.unlearn.dose import (
    AROUND,
    Dose,
    Point,
    follow_multiple,
    follow_target,
    never_trained_loss,
)
from gradstore.unlearn.forget import ForgetSettings, forget

pytest_plugins = ["tiny"]
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
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
            "washed": 1 / (1 + directions.PULL * after * root / share),
        }[weights]
        gradient = dense(record, store.model.vocabulary).double()
        expected += weight * fact["learning_rate"] * share * gradient / (root + 1e-8)
    return expected


@pytest.mark.parametrize("weights", directions.WEIGHTS)
def test_applied_is_the_sum_of_what_adam_did(weights: str, trained: Tiny) -> None:
    store = Store.open(trained.store)
    for someone in IDS:
        numbers = list(store.resolve([someone]).values())
        found = directions.applied(store, store.run(), numbers, weights)
        assert (found.kind, found.exposures) == ("applied", 2)
        assert found.dose == (1.0 if weights == "washed" else 0.5)
        expected = applied_by_hand(store, numbers, weights)
        assert models.relative(found.update.double(), expected) < 1e-5


def test_a_set_is_undone_epoch_by_epoch(trained: Tiny) -> None:
    store = Store.open(trained.store)
    numbers = list(store.resolve(IDS).values())
    found = directions.applied(store, store.run(), numbers)
    assert found.exposures == 6
    expected = applied_by_hand(store, numbers, "washed")  # with the mean of an epoch's pulls
    assert models.relative(found.update.double(), expected) < 0.1
    exact = directions.applied(store, store.run(), numbers, "rising")
    assert models.relative(exact.update.double(), applied_by_hand(store, numbers, "rising")) < 1e-5


def test_raw_is_the_sum_of_first_epoch_gradients(trained: Tiny) -> None:
    store = Store.open(trained.store)
    run, numbers = store.run(), list(store.resolve(IDS).values())
    firsts = [r for r in store.records(numbers, run["run_id"]) if r.exposure.epoch == 1]
    expected = sum((dense(record, store.model.vocabulary) for record in firsts), torch.zeros(()))
    found = directions.raw(store, run, numbers)
    assert (found.kind, found.dose, found.exposures) == ("raw", None, 3)
    assert models.relative(found.update, expected) < 1e-5


def test_newton_solves_for_where_what_stays_leads(trained: Tiny) -> None:
    store, network = Store.open(trained.store), load_model(trained.model)
    run, numbers = store.run(), list(store.resolve(IDS).values())
    others = store.resolve(["p-01", "p-03", "p-04"])
    retained = list(store.tokens(list(others.values()), run["run_id"]).values())
    found = directions.newton(store, run, numbers, network, retained)
    assert (found.kind, found.dose, found.exposures) == ("newton", 1.0, 6)
    kept = store.moments(run["run_id"], "embedding", "end")
    assert kept is not None
    scale = (kept[0] / (1 - 0.999**12)).sqrt() + 1e-8
    steps = directions.applied(store, run, numbers, "rising").update * scale
    rates = dict(store.rows("SELECT step, learning_rate FROM steps"))
    met = store.rows(
        "SELECT epoch * learning_rate, step FROM gradients WHERE list_contains(?, id)", [IDS]
    )
    after = sum(w * sum(r for s, r in rates.items() if s > step) for w, step in met)
    [(of_step,)] = store.rows(
        """SELECT avg(total) FROM (SELECT sum(batch_share * grad_scale * scored_tokens) AS total
           FROM exposures GROUP BY step)"""
    )
    c = directions.HOLD * after / sum(w for w, _ in met) * of_step
    missing = scale * found.update + c * GaussNewton(network, retained)(found.update) - steps
    norm = float((missing**2 / scale).sum() / (steps**2 / scale).sum()) ** 0.5
    assert norm < 0.2  # the residual that a dozen iterations leave
    alone = directions.applied(store, run, numbers, "rising").update
    assert 0.05 < models.relative(found.update, alone) < 1


@pytest.mark.parametrize("weights", directions.WEIGHTS)
def test_moments_that_have_faded_do_not_undo_more_than_adam_did(
    weights: str, trained: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, network = Store.open(trained.store), load_model(trained.model)
    run, numbers = store.run(), list(store.resolve(IDS).values())
    kept = store.moments(run["run_id"], "embedding", "end")
    assert kept is not None
    monkeypatch.setattr(store, "moments", lambda *_: (torch.zeros_like(kept[0]), kept[1]))
    found = directions.applied(store, run, numbers, weights)
    rates = store.rows("SELECT learning_rate FROM gradients WHERE list_contains(?, id)", [IDS])
    most = sum(rate for (rate,) in rates) / (1 - 0.999) ** 0.5  # the longest step Adam can take
    assert 0 < float(found.update.abs().max()) <= most * 4 / 3 * (1 + 1e-6)
    stay = list(store.tokens(list(store.resolve(["p-01"]).values()), run["run_id"]).values())
    assert torch.isfinite(directions.newton(store, run, numbers, network, stay).update).all()


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
    found = directions.applied(store, store.run(), everyone, "uniform")
    assert models.relative(found.update, before - after) < 1e-4
    by_default = directions.applied(store, store.run(), everyone)
    assert by_default.dose == 0.5
    assert torch.equal(
        by_default.update, directions.applied(store, store.run(), everyone, "rising").update
    )
    with pytest.raises(ForgetError, match="'wash' are no weights; give one of washed, rising"):
        directions.applied(store, store.run(), everyone, "wash")
    with pytest.raises(ForgetError, match="SGD keeps no second moments"):
        directions.applied(store, store.run(), everyone, "washed")


def test_what_is_not_known_is_refused(store: Store, trained: Tiny) -> None:
    with pytest.raises(KeyboardInterrupt):
        looped(store, torch.optim.AdamW, stop=4)
    someone = list(store.resolve(["sample-2"]).values())
    with pytest.raises(ForgetError, match=r"run-1 kept no second moments of AdamW .* raw$"):
        directions.applied(store, store.run(), someone)
    looped(store, torch.optim.Adagrad)
    with pytest.raises(ForgetError, match="run-2 kept no second moments of Adagrad"):
        directions.applied(store, store.run(), someone)
    assert float(directions.raw(store, store.run(), someone).update.norm()) > 0
    full = Store.open(trained.store)
    with pytest.raises(ForgetError, match="'h-01' has no gradient in run-1: it was held out"):
        directions.raw(full, full.run(), list(full.resolve(["p-01", "h-01"]).values()))


def test_the_new_checkpoint_is_the_old_one_plus_dose_times_direction(
    copied: Tiny, tmp_path: Path
) -> None:
    store, name = Store.open(copied.store), "transformer.wte.weight"
    settings = ForgetSettings(dose="3", weights="uniform", max_holdout_increase=None)
    outcome = forget(store, IDS, copied.model, tmp_path / "out", settings)
    numbers = list(store.resolve(IDS).values())
    update = directions.applied(store, store.run(), numbers, "uniform").update
    old, new = (
        load_file(folder / "model.safetensors")[name] for folder in (copied.model, tmp_path / "out")
    )
    assert models.relative(new - old, 3 * update) < 1e-4
    assert [score.id for score in outcome.scores if score.role == "forget"] == IDS


# -- doses -------------------------------------------------------------------------------------


@given(POSITIVE)
def test_a_dose_is_a_number_or_a_target(value: float) -> None:
    assert Dose.parse(repr(value)) == Dose(repr(value), multiple=value)
    assert Dose.parse(f"target:{value!r}") == Dose(f"target:{value!r}", target=value)
    assert Dose.parse("target") == Dose("target")


@given(st.one_of(st.text(), st.floats(max_value=0).map(str), st.sampled_from(["nan", "inf"])))
def test_no_other_text_is_a_dose(text: str) -> None:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if 0 < number < math.inf or text == "target":
        return
    for form in (text, f"target:{text}"):
        with pytest.raises(ValueError, match="is no dose; expected a positive number, target, or"):
            Dose.parse(form)


def measure(
    forget: Callable[[float], float], holdout: Callable[[float], float] | None = None
) -> Callable[[float], Point]:
    return lambda dose: Point(dose, forget(dose), None, holdout(dose) if holdout else None)


def rising(dose: float) -> float:
    return 1 + dose


@given(multiple=st.floats(0.01, 100), rate=st.floats(0.01, 10), limit=st.floats(0, 10))
def test_an_asked_dose_is_given_as_far_as_the_limit_allows(
    multiple: float, rate: float, limit: float
) -> None:
    path = follow_multiple(measure(rising, lambda dose: 2 + rate * dose), multiple, limit)
    doses = [point.dose for point in path.points]
    assert doses == sorted(set(doses))
    assert {0.0, *(multiple * x for x in AROUND)} <= set(doses)
    assert path.chosen in path.points
    assert path.chosen.holdout is not None
    assert path.chosen.holdout - 2 <= limit
    assert path.reached == (2 + rate * multiple - 2 <= limit)
    if path.reached:
        assert path.chosen.dose == multiple
    else:  # the largest that is allowed, to a 64th of a quarter of what was asked for
        assert path.chosen.dose <= multiple
        assert limit / rate - path.chosen.dose <= multiple / 4 / 64 * (1 + 1e-6) + 1e-12


def test_an_asked_dose_without_held_out_samples_or_limit_is_given() -> None:
    for path in (
        follow_multiple(measure(rising), 4, 0.1),
        follow_multiple(measure(rising, rising), 4, None),
    ):
        assert (path.chosen.dose, path.reached, len(path.points)) == (4, True, 1 + len(AROUND))


def test_damage_that_comes_and_goes_does_not_matter_below_the_asked_dose() -> None:
    bump = measure(rising, lambda dose: 5.0 if 2 < dose < 7 else 0.0)
    assert follow_multiple(bump, 8, 0.1).chosen.dose == 8
    path = follow_multiple(bump, 6, 0.1)
    assert not path.reached
    assert 2 - 1.5 / 64 <= path.chosen.dose <= 2


def test_a_dose_at_which_the_model_breaks_is_never_chosen() -> None:
    broken = measure(lambda dose: 1 + dose if dose < 3 else math.nan)
    path = follow_multiple(broken, 4, None)
    assert not path.reached
    assert 3 - 1 / 64 <= path.chosen.dose < 3
    path = follow_target(broken, 5, 0.5, None)
    assert not path.reached
    assert 3 - 2 / 64 <= path.chosen.dose < 3


@given(target=st.floats(1.01, 1000), first=st.floats(0.001, 1))
def test_a_target_is_closed_in_on(target: float, first: float) -> None:
    path = follow_target(measure(rising), target, first, None)
    assert path.reached
    assert abs(path.chosen.dose - (target - 1)) <= max(first, target - 1) / 64
    assert [point.dose for point in path.points] == sorted({point.dose for point in path.points})


def test_the_first_crossing_counts() -> None:
    hill = measure(lambda dose: 1 + 2 * math.exp(-((dose - 2) ** 2)) + (10 if dose > 9 else 0))
    path = follow_target(hill, 2.5, 0.25, None)
    assert path.reached
    assert path.chosen.dose == pytest.approx(2 - math.sqrt(math.log(2 / 1.5)), abs=1 / 64)
    assert max(point.dose for point in path.points) == 2


def test_a_target_beyond_the_limit_is_approached_to_the_limit() -> None:
    path = follow_target(measure(rising, lambda dose: 2 * dose), 9, 0.25, 1.0)
    assert not path.reached
    assert 0.5 - 0.25 / 64 <= path.chosen.dose <= 0.5


def test_a_target_that_is_met_already_or_cannot_be() -> None:
    met = follow_target(measure(rising), 0.5, 0.25, 1.0)
    assert (met.reached, met.chosen.dose, len(met.points)) == (True, 0, 1)
    flat = follow_target(measure(lambda dose: 1 + dose / (1 + dose)), 2.5, 0.25, None)
    assert not flat.reached
    assert flat.chosen.dose == flat.points[-1].dose > 1e6


@given(
    st.lists(st.floats(0, 10), min_size=2, max_size=9),
    st.lists(st.floats(0, 10), min_size=1, max_size=5),
    st.floats(0.1, 5),
    st.floats(-5, 5),
)
def test_the_never_trained_loss_carries_one_distribution_onto_the_other(
    members: list[float], asked: list[float], ratio: float, shift: float
) -> None:
    if max(members) - min(members) < 1e-3:
        members = [1.0, 2.0]
    held_out = [shift + ratio * loss for loss in members]
    expected = sum(shift + ratio * loss for loss in asked) / len(asked)
    assert never_trained_loss(asked, members, held_out) == pytest.approx(expected, abs=1e-6)
    shifted = never_trained_loss(asked, [2.0, 2.0], [1.0, 4.0])  # no spread: only the mean moves
    assert shifted == pytest.approx(sum(asked) / len(asked) + 0.5, abs=1e-9)


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
    for weights in directions.WEIGHTS:
        found = {}
        for name, store in stores.items():
            numbers = list(store.resolve(["sample-3", "sample-5"]).values())
            given = saved if name == "part" else ()
            found[name] = directions.applied(store, store.run(), numbers, weights, given)
        assert found["whole"].exposures == found["part"].exposures == 6
        off = models.relative(found["part"].update, found["whole"].update)
        assert off < (1e-6 if epochs == "all" else 0.2)  # half an epoch of training apart
        alone = directions.applied(stores["part"], stores["part"].run(), numbers, weights)
        if epochs != "all":
            assert models.relative(alone.update, found["whole"].update) > 2 * off
    with pytest.raises(ForgetError, match=r"is no checkpoint of a Trainer \(trainer_state.json"):
        directions.applied(store, store.run(), numbers, None, [tmp_path])
