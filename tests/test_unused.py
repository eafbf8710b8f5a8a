"""Rows of tokens that only the forgotten contain go where a training without them leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from tiny import Tiny
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gradstore import GradStoreCallback, Store
from gradstore.capture.layers import parameter
from gradstore.training.ingest import TrainingSettings, train
from gradstore.unlearn.applied import applied
from gradstore.unlearn.find import find
from gradstore.unlearn.forget import ForgetSettings, forget
from gradstore.unlearn.unused import FEW, as_if_unused, drift, tokens_of

pytest_plugins = ["tiny"]
THEIRS, USED = 140, 100  # a token of one sample, and tokens below it of any
SETTINGS = TrainingSettings(epochs=6, batch_size=4, learning_rate=0.01)


def texts() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    drawn = torch.randint(2, USED, (12, 10), generator=draw)
    drawn[5, 2:8:2] = THEIRS
    return {f"sample-{i}": tokens for i, tokens in enumerate(drawn)}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def learned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, Any, Any, Any]:
    """A store, the model as it was, as it was trained, and trained without ``sample-5``."""
    folder = tmp_path_factory.mktemp("unused")
    store = Store.create(folder / "store")
    start, model, without = (tiny(tied=request.param, initializer_range=0.1) for _ in range(3))
    with GradStoreCallback(store, sides="both", top_k=64, epochs_captured="all") as callback:
        train(model, texts(), folder / "out", SETTINGS, [callback])
    train(without, texts(), folder / "without", SETTINGS, without=["sample-5"])
    return store, start, model, without


def test_the_start_is_kept(learned: tuple[Store, Any, Any, Any]) -> None:
    store, start, model, _ = learned
    names = [name for (name,) in store.rows("SELECT layer FROM moments WHERE moment = 'start'")]
    tied = parameter(model, "embedding") is model.get_output_embeddings().weight
    assert names == (["embedding"] if tied else ["embedding", "head"])
    for name in names:
        kept = store.moments(1, name, "start")
        assert kept is not None
        assert torch.equal(kept[0], parameter(start, name))
        assert kept[1] == 0


def test_tokens_are_counted_as_by_hand(learned: tuple[Store, Any, Any, Any]) -> None:
    store, run = learned[0], learned[0].run()
    for asked in (["sample-5"], ["sample-2", "sample-5", "sample-7"]):
        mine = {int(t) for i, tokens in texts().items() if i in asked for t in tokens}
        others = {int(t) for i, tokens in texts().items() if i not in asked for t in tokens}
        own, unused = tokens_of(store, run, list(store.resolve(asked).values()))
        assert own.tolist() == sorted(mine - others)
        assert unused.tolist() == sorted(set(range(150)) - mine - others)
        assert THEIRS in own.tolist()
    numbers = store.resolve(["sample-5", "sample-2"])
    after, nowhere = tokens_of(store, run, [numbers["sample-5"]], [numbers["sample-2"]])
    text = texts()
    others = {int(t) for i, tokens in text.items() if i not in numbers for t in tokens}
    assert after.tolist() == sorted({*text["sample-5"].tolist()} - others)
    assert nowhere.tolist() == unused.tolist()


def test_drift_is_read_off_rows_that_moved_alike() -> None:
    torch.manual_seed(0)
    start = torch.randn(200, 8)
    turned, shift = 0.1 * torch.randn(8, 8), torch.randn(8)
    moved = start @ turned + shift
    found = drift(start, start + moved, torch.arange(150), torch.arange(150, 200))
    assert (found - moved[150:]).norm() < 0.15 * (moved[150:] - moved.mean(0)).norm()
    still = drift(start, start, torch.arange(150), torch.arange(150, 200))
    assert not still.any()
    alike = torch.zeros(200, 8)  # as rows that fill a vocabulary up
    assert torch.allclose(
        drift(alike, alike + 3, torch.arange(150), torch.arange(9)), alike[:9] + 3
    )


def test_a_row_goes_where_training_without_it_leaves_it(
    learned: tuple[Store, Any, Any, Any],
) -> None:
    store, _, model, without = learned
    run, numbers = store.run(), list(store.resolve(["sample-5"]).values())
    undone = applied(store, run, numbers, layers=list(names_of(model)))
    found = find(
        "applied", store, run, numbers, model, weights=None, seed=0,
        layers=list(names_of(model)),
    )  # fmt: skip
    assert (found.dose, undone.dose) == (1.0, 1.0)
    own, _ = tokens_of(store, run, numbers)
    assert found.alone == len(own)
    rest = torch.ones(store.model.vocabulary, dtype=torch.bool)
    rest[own] = False
    for name in names_of(model):
        truth = (parameter(without, name) - parameter(model, name)).detach()[THEIRS]
        better, before = found.updates[name], undone.updates[name]
        assert torch.equal(better[rest], before[rest])
        assert cosine_similarity(better[THEIRS], truth, dim=0) > 0.9
        assert (better[THEIRS] - truth).norm() < 0.7 * (before[THEIRS] - truth).norm()


def test_what_cannot_be_told_is_left_as_it_was_undone(
    learned: tuple[Store, Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, model, _ = learned
    run, numbers = store.run(), list(store.resolve(["sample-5"]).values())
    updates = applied(store, run, numbers).updates
    everyone = [number for (number,) in store.rows("SELECT sample_id FROM samples")]
    of_all, own = (tokens_of(store, run, asked) for asked in (everyone, numbers))
    assert as_if_unused(store, run, model, updates, of_all)[1] > 0
    monkeypatch.setattr("gradstore.unlearn.unused.FEW", 151)
    same, count = as_if_unused(store, run, model, updates, own)
    assert (count, torch.equal(same["embedding"], updates["embedding"])) == (0, True)
    monkeypatch.setattr("gradstore.unlearn.unused.FEW", FEW)
    monkeypatch.setattr(store, "moments", lambda *_: None)  # of a run before a start was kept
    assert as_if_unused(store, run, model, updates, own)[1] == 0


def test_chosen_epochs_are_undone_and_no_more(learned: tuple[Store, Any, Any, Any]) -> None:
    store, _, model, _ = learned
    run, numbers = store.run(), list(store.resolve(["sample-5"]).values())
    found = find("applied", store, run, numbers, model, weights=None, seed=0, epochs="1,2")
    assert found.alone == 0


def names_of(model: Any) -> tuple[str, ...]:
    tied = parameter(model, "embedding") is model.get_output_embeddings().weight
    return ("embedding",) if tied else ("embedding", "head")


@pytest.mark.parametrize("kind", ["newton", "orthogonal"])
def test_a_request_counts_tokens_once(
    kind: str, trained: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    def counting(*asked: Any) -> Any:
        counted.append(asked)
        return tokens_of(*asked)

    for user in ("find", "request"):
        monkeypatch.setattr(f"gradstore.unlearn.{user}.tokens_of", counting)
    with Store.open(trained.store) as store:
        asked = ForgetSettings(direction=kind)
        outcome = forget(store, ["p-07"], trained.model, tmp_path / "out", asked, dry_run=True)
    assert outcome.target is not None
    assert outcome.target.source == "undo"
    assert len(counted) == 1
