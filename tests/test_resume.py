"""An interrupted ingest goes on where it stopped: one run, every exposure once."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import BATCH, EPOCHS, FAR, FRESH, TRAINED, Tiny, files, refused, run, run_json

from gradstore import Store
from gradstore.training.ingest import _Reporting

STEPS_PER_EPOCH = TRAINED // BATCH
CUT = STEPS_PER_EPOCH + 2  # in the second epoch
Command = list[object]

pytest_plugins = ["tiny"]


def rows(store: Path, query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run_json("sql", query, "-s", store)
    return found


def command(tiny: Tiny, *more: object) -> Command:
    return ["ingest", tiny.data, "-s", tiny.store, "--config", tiny.config, *FRESH,
            "--holdout", tiny.holdout, "--out", tiny.model, *more]  # fmt: skip


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tiny, Command]:
    """An ingest that control-C ended in its second epoch, and its command."""
    tiny = files(tmp_path)
    arguments = command(tiny, "--save-checkpoints")
    run("init", tiny.store)
    report = _Reporting.on_step_end

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        report(self, args, state, control, **kwargs)
        if state.global_step == CUT:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_Reporting, "on_step_end", interrupt)
        result = run(*arguments, code=1)
    assert result.stderr.rstrip().endswith("Aborted!")
    return tiny, arguments


def test_what_was_captured_before_the_interruption_is_kept(
    interrupted: tuple[Tiny, Command],
) -> None:
    tiny, _ = interrupted
    assert rows(tiny.store, "SELECT status, steps FROM runs") == [
        {"status": "failed", "steps": CUT}
    ]
    steps = rows(tiny.store, "SELECT step, count(*) n FROM exposures GROUP BY step ORDER BY step")
    assert [(s["step"], s["n"]) for s in steps] == [(n, BATCH) for n in range(1, CUT + 1)]
    assert not (tiny.model / "model.safetensors").exists()


def test_resuming_completes_the_run(interrupted: tuple[Tiny, Command], trained: Tiny) -> None:
    tiny, arguments = interrupted
    assert "choose another --out" in refused(*arguments)
    run(*arguments, "--resume")

    [finished] = rows(tiny.store, "SELECT run_id, status, steps FROM runs")
    assert finished == {"run_id": 1, "status": "finished", "steps": STEPS_PER_EPOCH * EPOCHS}
    query = "SELECT id, epoch, step, learning_rate, batch_share FROM gradients ORDER BY ALL"
    met = rows(tiny.store, query)
    assert Counter((m["id"], m["epoch"]) for m in met) == Counter(
        (f"p-{number:02d}", epoch) for number in range(1, TRAINED + 1) for epoch in (1, 2)
    )
    assert met == rows(trained.store, query)  # as if it had never stopped
    losses = "SELECT id, epoch, loss FROM holdout_losses NATURAL JOIN samples ORDER BY ALL"
    once, again = rows(trained.store, losses), rows(tiny.store, losses)
    assert [(h["id"], h["epoch"]) for h in again] == [(h["id"], h["epoch"]) for h in once]
    assert [h["loss"] for h in again] == pytest.approx([h["loss"] for h in once], rel=1e-5)

    weights, expected = (load_file(t.model / "model.safetensors") for t in (tiny, trained))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.allclose(weight, expected[name], rtol=1e-5, atol=1e-6), name
    resumed, whole = Store.open(tiny.store), Store.open(trained.store)
    for moment in ("first-epoch", "end"):
        found, kept = (store.moments(1, "embedding", moment) for store in (resumed, whole))
        assert found is not None
        assert kept is not None
        assert found[1] == kept[1]
        assert torch.allclose(found[0], kept[0], rtol=1e-4)
    run("forget", "p-07", "-s", tiny.store, "--model", tiny.model, "--out",
        tiny.model.with_name("out"), *FAR)  # fmt: skip
    exact = [run_json("forget", "p-07", "-s", t.store, "--model", t.model, "--out",
                      tiny.model.with_name("exact"), "--exact", "--dry-run")
             for t in (tiny, trained)]  # fmt: skip
    after = [[f["loss_after"] for f in each["forgotten"]] for each in exact]
    assert after[0] == after[1]  # it is replayed as if it had never stopped


def test_a_run_without_checkpoints_cannot_be_resumed(tmp_path: Path) -> None:
    tiny = files(tmp_path)
    run("init", tiny.store)
    said = refused(*command(tiny, "--resume"))
    assert "Only a run started with --save-checkpoints can be resumed" in said
    assert not tiny.model.exists()
