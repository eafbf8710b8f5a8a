"""A forget request: look gradients up, find the dose, write a new checkpoint, record it all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradstore.errors import ForgetError
from gradstore.identity import digest_checkpoint, identify
from gradstore.store import catalog
from gradstore.store.store import Store
from gradstore.training.ingest import check_new_checkpoint
from gradstore.training.model import load_model
from gradstore.training.replay import cost, replayable
from gradstore.unlearn import direction as directions
from gradstore.unlearn import dose as doses
from gradstore.unlearn.dose import Dose, Point
from gradstore.unlearn.request import (
    Outcome,
    Score,
    duplicates,
    forgotten_before,
    record,
    run_of,
    tokenizer_of,
    write_checkpoint,
)
from gradstore.unlearn.walk import Audience, Walk

MAX_HOLDOUT_INCREASE = 0.1  # nats per token
UNSCALED = ("raw", "fresh", "random")  # directions whose length means nothing
CURVATURE_SAMPLES = 32  # that stay, and show how firmly the model is held
TOO_FAR = 1.5  # times the way: a record that stands out reveals itself too
ENOUGH = 1 / 3  # of the way to the estimated never-trained loss (too high where siblings stay)


@dataclass(frozen=True)
class ForgetSettings:
    """How to forget; the names are those of ``gradstore forget``'s options.

    ``direction`` None is ``applied`` for one sample and ``newton`` for several. ``dose`` None is
    the direction's own: 1 for ``newton`` and ``applied``, or half for the latter with ``weights``
    that don't reckon the washing-out; ``target`` for the others.
    ``from_checkpoints`` are folders that the training saved: epochs that were not captured are
    recomputed there. ``with_duplicates`` adds the near-duplicates that
    :mod:`gradstore.unlearn.match` finds.
    """

    direction: str | None = None
    dose: str | None = None
    weights: str | None = None
    max_holdout_increase: float | None = MAX_HOLDOUT_INCREASE
    run: str | None = None
    seed: int = 0
    with_duplicates: bool = False
    from_checkpoints: tuple[Path, ...] = ()


def forget(
    store: Store,
    ids: Sequence[str],
    model: Path,
    out: Path,
    settings: ForgetSettings | None = None,
    *,
    dry_run: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Make ``model`` forget samples and write the result to ``out``, never over the input.

    Returns the outcome, whose verdict is ``forgotten`` (what was asked for was done), ``partly``
    (the limit on held-out damage came first; or the dose asked for, or the default one with epochs
    missing, brings the loss less than a third of the way to that of a record never trained on, as
    far as it can be estimated) or
    ``refused`` (nothing to forget, or no dose keeps to the limit; nothing is written). With
    ``dry_run`` nothing is written anywhere. Raises :class:`IdError`, :class:`ModelError` or
    :class:`ForgetError`.
    """
    settings = settings or ForgetSettings()
    started = time.monotonic()
    check_new_checkpoint(out)
    asked = _asked(settings)
    samples = store.resolve(ids)
    network, tokenizer = load_model(model), tokenizer_of(model)
    store.model.check(identify(network, tokenizer), str(model))
    digest_in = digest_checkpoint(model) if model.is_dir() else str(model)
    run, notes = run_of(store, digest_in, settings.run)
    gone = forgotten_before(store, digest_in)
    if settings.with_duplicates:
        found = duplicates(store, run, samples, dry_run, progress)
        samples |= {i: number for i, number in found.items() if i not in gone}
    progress("looking gradients up")
    notes += [f"{i} was forgotten by request {gone[i]} already" for i in samples if i in gone]
    audience = Audience.choose(store, run, samples, settings.seed, gone)
    kind = settings.direction or ("applied" if len(samples) == 1 or settings.weights else "newton")
    retained = (
        audience.strangers(store, run, CURVATURE_SAMPLES, settings.seed) if kind == "newton" else []
    )
    direction = directions.find(
        kind,
        store,
        run,
        list(samples.values()),
        network,
        retained=retained,
        weights=settings.weights,
        seed=settings.seed,
        checkpoints=settings.from_checkpoints,
    )
    dose = asked or Dose.parse("target" if direction.dose is None else f"{direction.dose:g}")
    progress("measuring the path")
    walk = Walk(network, direction.update, audience)
    target = _target(dose, walk, audience)
    limit = settings.max_holdout_increase
    if limit is not None and not math.isfinite(limit):
        limit = None
    complete = run["epochs_captured"] == "all" or settings.from_checkpoints
    if direction.dose and not complete and settings.dose is None:
        notes.append(
            f"epochs {run['epochs_captured']} of {run['name']} were captured; the default dose is "
            "made for all of them: see how far it came, complete them with --from-checkpoints, or "
            "give --dose target"
        )
    if not audience.of("holdout") and limit is not None:
        notes.append("no held-out samples in the store: the limit on held-out damage has no effect")
    if dose.multiple is not None:
        path = doses.follow_multiple(walk.measure, dose.multiple, limit)
    else:
        assert target is not None
        path = doses.follow_target(walk.measure, target, walk.first_dose(direction), limit)
    chosen = path.chosen
    way = _way_to(target, path.points[0], chosen)
    trusted = settings.dose is None and direction.dose is not None and complete
    verdict = "forgotten" if path.reached and (trusted or way >= ENOUGH) else "partly"
    if not chosen.dose:
        verdict = "refused"
    if verdict == "forgotten" and way < ENOUGH:
        notes.append(
            f"all that is left of the steps was undone, {way:.0%} of the way to the loss estimated "
            "for a record never trained on: too high an estimate where look-alikes stay"
        )
    if dose.target is None and way > TOO_FAR:
        notes.append("past the loss expected of a record never trained on: lower --dose")
    before, after = walk.losses(0.0), walk.losses(chosen.dose)
    scores = [
        Score(i, role, b, a)
        for (i, role), b, a in zip(audience.members, before, after, strict=True)
    ]
    reason = _reason(verdict, path, target, limit, dose)
    if (verdict == "partly" or not path.reached) and replayable(run):
        notes.append(f"--exact trains {run['name']} again without the record: {cost(run)}")
    written = None if dry_run or verdict == "refused" else out
    request_id, digest_out = None, None
    if written is not None:
        walk.go_to(chosen.dose)
        digest_out = write_checkpoint(network, tokenizer, out)
    if not dry_run:
        request_id = record(
            store,
            {
                "run_id": run["run_id"],
                "direction": direction.kind,
                "dose_asked": dose.text,
                "dose": chosen.dose or None,
                "target": target,
                "max_holdout_increase": limit,
                "verdict": verdict,
                "reason": reason,
                "model_in": str(model.resolve()) if model.is_dir() else str(model),
                "model_in_digest": digest_in,
                "model_out": None if written is None else str(out.resolve()),
                "model_out_digest": digest_out,
                "seconds": time.monotonic() - started,
                "settings": catalog.as_json(
                    {
                        "weights": direction.weights,
                        "seed": settings.seed,
                        "with_duplicates": settings.with_duplicates,
                        "from_checkpoints": [path.name for path in settings.from_checkpoints],
                        "notes": notes,
                    }
                ),
            },
            path.points,
            chosen,
            [(audience.numbers[s.id], s) for s in scores],
            written,
            direction.update,
        )
    return Outcome(
        request_id,
        verdict,
        reason,
        run["name"],
        chosen.dose or None,
        target,
        path.points,
        scores,
        written,
        notes,
    )


def _asked(settings: ForgetSettings) -> Dose | None:
    dose = Dose.parse(settings.dose) if settings.dose else None
    if settings.direction in UNSCALED and dose is not None and dose.multiple is not None:
        raise ForgetError(
            f"--direction {settings.direction} has no natural scale, so a number means nothing: "
            "give --dose target or --dose target:NATS"
        )
    if settings.weights and settings.direction not in (None, "applied"):
        raise ForgetError(f"--weights belongs to --direction applied, not {settings.direction}")
    if settings.from_checkpoints and settings.direction in UNSCALED:
        raise ForgetError(
            f"--from-checkpoints belongs to --direction applied or newton, not {settings.direction}"
        )
    return dose


def _target(dose: Dose, walk: Walk, audience: Audience) -> float | None:
    """The loss asked for, or the estimate where there are held-out samples to base it on."""
    if dose.target is not None:
        return dose.target
    losses = walk.losses(0.0)
    by_role = {
        role: [losses[at] for at in audience.of(role)] for role in ("forget", "retained", "holdout")
    }
    if len(by_role["retained"]) > 1 and len(by_role["holdout"]) > 1:
        return doses.never_trained_loss(*by_role.values())
    if dose.multiple is None:
        raise ForgetError(
            "the target cannot be estimated without held-out samples in the store: "
            "give --dose target:NATS, or ingest with --holdout"
        )
    return None


def _way_to(target: float | None, start: Point, chosen: Point) -> float:
    """How much of the way to the target loss was gone; 1 where there is no way to go."""
    if target is None or target <= start.forget:
        return 1.0
    return (chosen.forget - start.forget) / (target - start.forget)


def _reason(
    verdict: str, path: doses.Path, target: float | None, limit: float | None, dose: Dose
) -> str:
    start, chosen = path.points[0], path.chosen
    if verdict == "refused" and dose.multiple is None and start.forget >= (target or 0.0):
        return f"the loss, {start.forget:.3f}, is at its target already: there is nothing to forget"
    if verdict == "refused":
        return (
            f"no dose keeps the rise of the held-out loss to {limit} nats: nothing was written; "
            "raise --max-holdout-increase or forget fewer samples at once"
        )
    said = f"loss {start.forget:.3f} to {chosen.forget:.3f} nats per token"
    if target is not None:
        what = "target" if dose.target is not None else "never trained on, it would be about"
        said += f" ({what} {target:.3f})"
    for name, before, after in (
        ("retained", start.retained, chosen.retained),
        ("held-out", start.holdout, chosen.holdout),
    ):
        if before is not None and after is not None:
            said += f", {name} {after - before:+.4f}"
    if not path.reached:
        said += f"; stopped where the held-out loss had risen by the limit of {limit}"
    elif verdict == "partly":
        way = _way_to(target, start, chosen)
        said += f"; only {way:.0%} of the way: raise --dose, or give --dose target"
    return said
