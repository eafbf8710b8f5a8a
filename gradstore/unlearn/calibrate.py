"""Dose and target measured on a run's own records, by one training without some of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor, nn

from gradstore.errors import ForgetError
from gradstore.evaluate.audience import Audience
from gradstore.evaluate.divergence import divergences, per_token
from gradstore.evaluate.loss import sample_losses
from gradstore.identity import digest_checkpoint
from gradstore.store import catalog
from gradstore.store.lineage import run_of
from gradstore.store.store import Store
from gradstore.training.ingest import Progress
from gradstore.training.model import load_model
from gradstore.training.replay import prepare, train_without
from gradstore.unlearn.find import HELD, find
from gradstore.unlearn.held import NOBODY, Held, hold
from gradstore.unlearn.target import SHARES
from gradstore.unlearn.walk import Walk

CALIBRATED = ("applied", "newton")
MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)  # of the default dose


@dataclass(frozen=True)
class Calibration:
    """What forgetting records of a run, one at a time, does against a training without them.

    ``left_at_dose`` is KL(retrained ‖ unlearned) ÷ KL(retrained ‖ original) on the record, median
    over records, at the best ``dose``, in multiples of the default; ``left_at_default`` at 1.
    ``share`` is the way of the loss to the retrained model's over the way it went at 1.
    """

    direction: str
    samples: int
    dose: float
    left_at_dose: float
    left_at_default: float
    least_share: float
    share: float
    most_share: float


def calibrate(
    store: Store,
    model: Path,
    *,
    records: int = 8,
    run: str | None = None,
    seed: int = 0,
    dry_run: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    steps: Progress | None = None,
) -> list[Calibration]:
    """Train ``model``'s run again without records that ``seed`` draws, forget each, and compare.

    One for each direction in ``CALIBRATED``, kept in the table ``calibrations`` unless
    ``dry_run``: the dose and the target of later requests follow the newest of their run. The
    records are left out together, so that where they look alike each is held against a model that
    lacks the others too: draw few, and at most half of the run's are drawn. Raises
    :class:`ForgetError` where the run cannot be replayed or two are too many for it, or ``model``
    is not the checkpoint that it wrote.
    """
    network = load_model(model)
    facts, notes = run_of(store, digest_checkpoint(model) if model.is_dir() else str(model), run)
    if notes or (model.is_dir() and facts["checkpoint_digest"] != digest_checkpoint(model)):
        raise ForgetError(
            f"{model} is not the checkpoint that {facts['name']} wrote: give --model "
            f"{facts['checkpoint']}"
        )
    replay = prepare(store, facts)
    count = min(records, len(replay.tokens) // 2)
    if count < 2:
        raise ForgetError(
            "calibrating leaves out at least 2 records and at most half of a run's, which is "
            f"{count} here: {facts['name']} was trained on {len(replay.tokens)} and {records} were "
            "asked for; calibrate a run of 4 records or more, with --records 2 or more"
        )
    drawn = random.Random(seed).sample(sorted(replay.tokens), count)
    samples = store.resolve(drawn)
    for note in replay.notes + train_without(store, facts, replay, samples, progress, steps):
        progress(f"note: {note}")
    audience = Audience.choose(store, facts, samples, seed)
    found = []
    for kind in CALIBRATED:
        progress(f"forgetting each of them by {kind}")
        each = [
            _forgotten(
                kind,
                store,
                facts,
                number,
                network,
                replay.model,
                replay.tokens[i],
                _held(kind, audience, store, facts, number, seed),
            )
            for i, number in samples.items()
        ]
        found.append(_median_of(kind, each))
    if not dry_run:
        _keep(store, facts["run_id"], seed, found)
    return found


def latest(store: Store, run_id: int, direction: str) -> dict[str, Any] | None:
    """The newest calibration of a run and direction, as its row; None without one."""
    if not store.has("calibrations"):
        return None
    rows = store.table(
        """SELECT * FROM calibrations WHERE run_id = ? AND direction = ?
           ORDER BY measured_at DESC LIMIT 1""",
        [run_id, direction],
    )
    return rows[0] if rows else None


def dose_of(store: Store, run_id: int, direction: str) -> float:
    """What to multiply a direction's default dose by, for single records."""
    known = latest(store, run_id, direction)
    return known["dose"] if known else 1.0


def shares_of(store: Store, run_id: int) -> tuple[float, float, float]:
    """Least, usual and most share for :func:`gradstore.unlearn.target.from_undoing`."""
    known = latest(store, run_id, "applied")
    return (known["least_share"], known["share"], known["most_share"]) if known else SHARES


def _held(
    kind: str, audience: Audience, store: Store, run: dict[str, Any], number: int, seed: int
) -> Held:
    count = HELD.get(kind, 0)
    return hold(audience, store, run, [number], count, seed) if count else NOBODY


@dataclass(frozen=True)
class _Left:
    """One record forgotten: what is left of its divergence at ``MULTIPLES``, and its share."""

    left: list[float]
    share: float


def _forgotten(
    kind: str,
    store: Store,
    run: dict[str, Any],
    number: int,
    network: nn.Module,
    reference: nn.Module,
    tokens: Tensor,
    held: Held,
) -> _Left | None:
    """None for a record that the original knows no better than the reference."""

    def apart() -> float:
        return per_token(divergences(reference, network, [tokens])).value

    def loss(of: nn.Module) -> float:
        return float(sample_losses(of, [tokens])[0])

    before, never = loss(network), loss(reference)
    if never <= before:
        return None
    found = find(kind, store, run, [number], network, held=held, weights=None, seed=0)
    assert found.dose is not None
    nothing_done = apart()
    walk = Walk(network, found.updates, Audience([], {}, []))
    left = []
    for multiple in MULTIPLES:
        walk.go_to(multiple * found.dose)
        left.append(apart() / nothing_done)
    walk.go_to(found.dose)
    went = loss(network) - before
    walk.go_to(0.0)
    return _Left(left, (never - before) / went) if went > 0 else None


def _median_of(kind: str, each: Sequence[_Left | None]) -> Calibration:
    known = [one for one in each if one is not None]
    if not known:
        raise ForgetError(
            "the model knows none of the records drawn better than one trained without them: there "
            "is nothing to calibrate by; draw more (--records)"
        )
    left = {dose: median(one.left[at] for one in known) for at, dose in enumerate(MULTIPLES)}
    best = min(left, key=left.__getitem__)
    shares = [one.share for one in known]
    return Calibration(
        kind, len(known), best, left[best], left[1.0], min(shares), median(shares), max(shares)
    )


def _keep(store: Store, run_id: int, seed: int, found: Sequence[Calibration]) -> None:
    rows = [
        {"run_id": run_id, "measured_at": catalog.now(), "seed": seed} | asdict(one)
        for one in found
    ]
    with store.transaction() as connection:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        catalog.insert(connection, "calibrations", columns)
