"""GradDiff and NPO as forget requests: what their steps did is the request's update."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from tiny import FRESH, Tiny, counts, digests, files, refused, run, run_json, write_jsonl
from torch import Tensor

from gradstore import Store
from gradstore.errors import DataError, ForgetError
from gradstore.training.model import load_model
from gradstore.unlearn.baselines import BaselineSettings, retained_from, unlearn_by_steps
from gradstore.unlearn.forget import ForgetSettings, forget
from gradstore.unlearn.request import Outcome
from gradstore.unlearn.settings import LEARNING_RATE, STEPS

pytest_plugins = ["tiny"]
KINDS = ("graddiff", "npo")
RATE, TARGET = 3e-3, 3.0
QUICK = ForgetSettings(
    direction="graddiff",
    dose=f"target:{TARGET}",
    learning_rate=RATE,
    max_holdout_increase=None,
)


def carried_out(tiny: Tiny, out: Path, asked: ForgetSettings, **more: Any) -> Outcome:
    with Store.open(tiny.store) as store:
        return forget(store, ["p-07"], tiny.model, out, asked, **more)


def expected(
    tiny: Tiny, kind: str, stay: list[Tensor] | None = None, model: Path | None = None,
    ids: tuple[str, ...] = ("p-07",), gone: tuple[str, ...] = (), **changes: Any
) -> tuple[dict[str, Tensor], float]:  # fmt: skip
    """The weights and the loss that the library's function ends with."""
    with Store.open(tiny.store) as store:
        stay = stay or retained_from(store, store.run(), [*ids, *gone])
        tokens = list(store.tokens(list(store.resolve(ids).values()), 1).values())
    target = changes.pop("target", TARGET)
    weight = 1.0 if kind == "graddiff" else 1 / (sum(len(t) - 1 for t in stay) / len(stay))
    settings: dict[str, Any] = {"steps": STEPS, "learning_rate": RATE} | changes
    network = load_model(model or tiny.model)
    steps = unlearn_by_steps(
        network, tokens, stay,
        BaselineSettings(cast(Any, kind), retained_weight=weight, **settings), target=target,
    )  # fmt: skip
    return network.state_dict(), steps.chosen.forget


def agrees(folder: Path, weights: dict[str, Tensor]) -> None:
    written = load_file(folder / "model.safetensors")
    for name, weight in written.items():
        assert torch.allclose(weight, weights[name], rtol=0, atol=1e-6), name


# -- what a request does -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_does_what_the_function_does(kind: str, copied: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run_json(
        "forget", "p-07", "-s", copied.store, "--model", copied.model, "--out", out, "--direction",
        kind, "--dose", f"target:{TARGET}", "--lr", RATE, "--max-holdout-increase", 99,
    )  # fmt: skip
    weights, loss = expected(copied, kind)
    agrees(out, weights)
    before = load_file(copied.model / "model.safetensors")
    assert not any(
        torch.equal(before[name], weight) for name, weight in weights.items() if name in before
    )
    [own] = found["forgotten"]
    assert own["loss_after"] == pytest.approx(loss, abs=1e-3)
    assert own["loss_after"] > own["loss_before"] + 0.3
    [request] = found["request"]
    assert (request["verdict"], request["dose"]) == ("forgotten", 1.0)
    [row] = Store.open(copied.store).table("SELECT direction, settings FROM requests")
    said = json.loads(row["settings"])
    assert (row["direction"], said["steps"], said["learning_rate"]) == (kind, STEPS, RATE)
    assert (said["layers"], said["retained"]) == (["all"], None)
    ledger = Store.open(copied.store).table("SELECT forecast_rise FROM ledger")
    assert len(ledger) > 20
    run("receipt", "verify", 1, "-s", copied.store)  # made again from the old one and the update
    run("verify", "-s", copied.store)
    assert "made to compare with" in report(copied, tmp_path)


def report(tiny: Tiny, folder: Path) -> str:
    run("report", 1, "-s", tiny.store, "--out", folder / "page.html")
    return (folder / "page.html").read_text()


def test_the_embedding_alone(copied: Tiny, tmp_path: Path) -> None:
    carried_out(copied, tmp_path / "out", replace(QUICK, layers=("embedding",)))
    agrees(tmp_path / "out", expected(copied, "graddiff", embedding_only=True)[0])
    before = load_file(copied.model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    moved = [name for name, weight in after.items() if not torch.equal(weight, before[name])]
    assert moved == ["transformer.wte.weight"]


def test_a_model_of_another_family(tmp_path: Path) -> None:
    tiny, llama = (
        files(tmp_path),
        {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1},
    )
    llama |= {"intermediate_size": 24, "num_attention_heads": 2, "max_position_embeddings": 64}
    tiny.config.write_text(json.dumps(llama | {"tie_word_embeddings": False}))
    run("init", tiny.store)
    run("ingest", tiny.data, "-s", tiny.store, "--config", tiny.config, *FRESH, "--out", tiny.model)
    outcome = carried_out(tiny, tmp_path / "out", replace(QUICK, dose="target:5.5"))
    assert outcome.out is not None
    agrees(tmp_path / "out", expected(tiny, "graddiff", target=5.5)[0])
    run("receipt", "verify", 1, "-s", tiny.store)


def test_what_was_forgotten_before_is_not_kept(copied: Tiny, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    carried_out(copied, once, QUICK)
    with Store.open(copied.store) as store:
        forget(store, ["p-07", "p-11"], once, twice, replace(QUICK, dose="target:5", seed=3))
    both: dict[str, Any] = {"model": once, "ids": ("p-11",), "gone": ("p-07",)}
    agrees(twice, expected(copied, "graddiff", **both, target=5.0, seed=3)[0])


def test_a_limit_stops_short_of_all_steps(copied: Tiny, tmp_path: Path) -> None:
    far = replace(QUICK, dose="target:5")
    rise = rise_of(carried_out(copied, tmp_path / "out", far, dry_run=True))
    asked = replace(far, max_holdout_increase=rise / 2)
    outcome = carried_out(copied, tmp_path / "out", asked)
    assert outcome.verdict == "partly"
    assert outcome.dose is not None
    assert 0 < outcome.dose < 1
    assert rise / 4 < rise_of(outcome) <= rise / 2
    assert "stopped at the limits: held-out loss" in outcome.reason
    run("receipt", "verify", 1, "-s", copied.store)


def rise_of(outcome: Outcome) -> float:
    held_out = [s for s in outcome.scores if s.role == "holdout"]
    return sum(s.after - s.before for s in held_out) / len(held_out)


def test_a_dry_run_writes_nothing(copied: Tiny, tmp_path: Path) -> None:
    before = counts(copied.store), digests(copied.store)
    outcome = carried_out(copied, tmp_path / "out", QUICK, dry_run=True)
    assert (outcome.verdict, outcome.request_id) == ("forgotten", None)
    assert not (tmp_path / "out").exists()
    assert (counts(copied.store), digests(copied.store)) == before


# -- steps that lead nowhere -------------------------------------------------------------------


def test_too_few_steps_are_told(copied: Tiny, tmp_path: Path) -> None:
    outcome = carried_out(copied, tmp_path / "out", replace(QUICK, dose="target:9", steps=2))
    assert outcome.verdict == "partly"
    assert outcome.dose == 1.0
    assert outcome.reason.endswith(
        "; graddiff at learning rate 0.003 (steps taken: 2) did not meet the target: raise --steps "
        "or --learning-rate"
    )


def test_a_step_over_the_target_is_told(copied: Tiny, tmp_path: Path) -> None:
    asked = replace(QUICK, direction="npo", dose="target:4", learning_rate=0.01)
    outcome = carried_out(copied, tmp_path / "out", asked)
    [(before, after)] = [(s.before, s.after) for s in outcome.scores if s.role == "forget"]
    assert 0 < after - before < 0.75 * (4 - before)
    assert outcome.verdict == "partly"
    assert outcome.reason.endswith(
        "(steps taken: 2) did not meet the target: lower --learning-rate"
    )


@pytest.mark.parametrize(
    ("rate", "dose", "advice"),
    [(9.0, "target:3", "lower --learning-rate"), (1e30, "target:3", "lower --learning-rate"),
     (1e-12, "target:99", "raise --steps or --learning-rate")],
)  # fmt: skip
def test_no_nearer_is_an_error(
    rate: float, dose: str, advice: str, copied: Tiny, tmp_path: Path
) -> None:
    asked = replace(QUICK, learning_rate=rate, dose=dose, steps=1)
    with pytest.raises(ForgetError, match=f"led from .* no nearer to .*: {advice}$"):
        carried_out(copied, tmp_path / "out", asked)
    assert not (tmp_path / "out").exists()


def test_what_is_met_already_takes_no_step(copied: Tiny, tmp_path: Path) -> None:
    talk: list[str] = []
    asked = replace(QUICK, dose="target:0.1")
    outcome = carried_out(copied, tmp_path / "out", asked, progress=talk.append)
    assert (outcome.verdict, outcome.dose) == ("refused", None)
    assert not any("steps" in line for line in talk)


# -- what stays --------------------------------------------------------------------------------


def test_records_of_a_file_are_kept_but_for_what_is_forgotten_or_erased(
    copied: Tiny, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in copied.data.read_text().splitlines()]
    text = {row["id"]: row["text"] for row in rows}
    long = {"id": "long", "text": " ".join([text["p-01"]] * 9)}
    mine = [{"id": "q-1", "text": "Zoe is a pilot."}, long]
    twin = {"id": "q-2", "text": text["p-07"]}
    kept = write_jsonl(tmp_path / "kept.jsonl", [*rows[4:12], twin, *mine])
    run("erase", "p-09", "-s", copied.store, "--yes")
    outcome = carried_out(copied, tmp_path / "out", replace(QUICK, direction="npo", retained=kept))
    assert outcome.notes[0] == (
        "left out of the 11 records of --retained, as forgotten or erased: 3"
    )
    network = load_model(copied.model)
    tokenizer = tokenizer_at(copied.model)
    stay = [r["text"] for r in [*rows[4:12], *mine] if r["id"] not in ("p-07", "p-09")]
    tokens = [torch.tensor(tokenizer(t)["input_ids"][:64]) for t in stay]
    assert len(tokens[-1]) == 64 == network.config.n_positions
    agrees(tmp_path / "out", expected(copied, "npo", tokens)[0])
    [row] = Store.open(copied.store).table("SELECT settings->>'retained' AS digest FROM requests")
    assert row["digest"] == digests(tmp_path)["kept.jsonl"]


def tokenizer_at(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def test_something_has_to_stay(copied: Tiny, tmp_path: Path) -> None:
    only = write_jsonl(
        tmp_path / "only.jsonl", [json.loads(copied.data.read_text().splitlines()[6])]
    )
    with pytest.raises(ForgetError, match="nothing stays .* give other records with --retained"):
        carried_out(copied, tmp_path / "out", replace(QUICK, retained=only))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"uuid": 1}\n')
    with pytest.raises(DataError, match="no 'id'"):
        carried_out(copied, tmp_path / "out", replace(QUICK, retained=broken))


def test_a_file_needs_a_tokenizer(
    copied: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstore.unlearn.request.tokenizer_of", lambda _: None)
    with pytest.raises(ForgetError, match="has no tokenizer to read --retained with: add one"):
        carried_out(copied, tmp_path / "out", replace(QUICK, retained=copied.data))
    carried_out(copied, tmp_path / "out", QUICK)
    agrees(tmp_path / "out", expected(copied, "graddiff")[0])


# -- what makes no sense -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--direction", "npo", "--dose", 1), "--direction npo has no natural scale"),
        (("--direction", "npo", "--weights", "washed"), "--weights belongs to --direction applied"),
        (("--direction", "npo", "--epochs", "1"), "--epochs belongs to directions of stored"),
        (("--direction", "npo", "--layers", "blocks"), "moves the whole model (--layers all) or"),
        (("--direction", "npo", "--from-checkpoints", "."), "--from-checkpoints belongs to"),
        (("--direction", "npo", "--iterate", 2), "npo has no rounds"),
        (("--steps", 9), "--steps belongs to --direction graddiff or npo, not the default"),
        (("--direction", "raw", "--lr", 1), "--learning-rate belongs to --direction graddiff or"),
        (("--direction", "fresh", "--retained", "DATA"), "--retained belongs to --direction"),
        (("--exact", "--steps", 9), "--exact trains from the start: it has no --direction"),
        (("--direction", "npo", "--steps", 0), "Invalid value for '--steps'"),
        (("--direction", "npo", "--lr", 0), "Invalid value for '--learning-rate'"),
        (("--direction", "npo", "--lr", 2), "Invalid value for '--learning-rate'"),
        (("--direction", "npo", "--retained", "nowhere"), "'nowhere' does not exist"),
        (("--direction", "ga"), "'ga' is not one of"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_usage(
    more: tuple[object, ...], said: str, trained: Tiny, tmp_path: Path
) -> None:
    given = [trained.data if word == "DATA" else word for word in more]
    error = refused(
        "forget", "p-07", "-s", trained.store, "--model", trained.model, "--out", tmp_path / "o",
        *given, code=2,
    )  # fmt: skip
    assert said in error


def test_help_tells_the_defaults() -> None:
    words = " ".join(run("forget", "-h").stdout.split())
    assert f"steps at most; they end at the target. [default: {STEPS}]" in words
    [said] = [
        part.split("]")[0] for part in words.split("a small model may need 1e-3. [default: ")[1:]
    ]
    assert float(said) == LEARNING_RATE
