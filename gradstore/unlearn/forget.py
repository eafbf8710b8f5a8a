"""A forget request: look gradients up, find the dose, write a new checkpoint, record it all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from gradstore.errors import ForgetError
from gradstore.evaluate.audience import Audience
from gradstore.evaluate.loss import token_losses
from gradstore.evaluate.neighbours import nearest_first, with_neighbours
from gradstore.store import catalog
from gradstore.store.files import sha256_of
from gradstore.store.store import Store
from gradstore.training.corpus import read_corpus
from gradstore.training.replay import cost, last_before, replayable
from gradstore.unlearn import dose as doses
from gradstore.unlearn.calibrate import dose_of, shares_of
from gradstore.unlearn.descent import descend
from gradstore.unlearn.direction import Direction
from gradstore.unlearn.dose import Dose, Limits
from gradstore.unlearn.find import HELD, HELD_INSIDE, find
from gradstore.unlearn.further import crossing
from gradstore.unlearn.held import NOBODY, Held, hold
from gradstore.unlearn.refusal import refuse
from gradstore.unlearn.request import (
    Outcome,
    Score,
    Subject,
    duplicates,
    record,
    write_checkpoint,
)
from gradstore.unlearn.rounds import iterate
from gradstore.unlearn.settings import BASELINES, EMBEDDING, ForgetSettings
from gradstore.unlearn.target import Target, from_held_out, from_undoing
from gradstore.unlearn.tokens import columns_of
from gradstore.unlearn.verdict import judged, reason_of, verdict_of
from gradstore.unlearn.walk import Walk

__all__ = ["ForgetSettings", "forget"]

ROLES = ("forget", "retained", "holdout")
LEAST = 1 / 64  # of a default dose, where its loss is too high


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
    (a limit came first, or the loss falls short of the range estimated for a record never trained
    on: :mod:`gradstore.unlearn.verdict`) or ``refused`` (nothing to forget, or no dose keeps to the
    limits; nothing is written). Samples that the checkpoint was made to forget before are left out,
    but with ``again``. With ``dry_run`` nothing is written anywhere. Raises :class:`IdError`,
    :class:`ModelError`, :class:`ForgetError`, or :class:`SettingsError` for settings that
    contradict each other.
    """
    settings = settings or ForgetSettings()
    started = time.monotonic()
    asked = settings.dose_asked()
    kept = None if (file := settings.retained) is None else read_corpus(file)
    kept_digest = None if file is None else sha256_of(file)
    subject = Subject.open(store, ids, model, out, settings.run)
    run, samples, gone, notes = subject.run, subject.samples, subject.gone, subject.notes
    inner = bool(store.layers(run["run_id"]))
    if settings.with_duplicates:
        found = duplicates(store, run, samples, dry_run, progress)
        samples |= {i: number for i, number in found.items() if i not in gone}
    known = [i for i in samples if i in gone]
    notes += [f"{i} was forgotten by request {gone[i]} already" for i in known]
    if known and not settings.again:
        notes.append(
            "left out is what was forgotten already: undoing its steps twice would go too far "
            "(--again does it all the same)"
        )
        if len(known) == len(samples):
            kind = settings.kind(samples, inner)
            return refuse(subject, kind, settings.dose or "default", started, dry_run)
        for i in known:
            del samples[i]
    progress("looking gradients up")
    audience = Audience.choose(store, run, samples, settings.seed, gone)
    limits = Limits(
        _finite(settings.max_holdout_increase),
        _finite(settings.max_retained_increase),
        _finite(settings.max_neighbour_increase),
    )
    kind = settings.kind(samples, inner)
    settings = settings.completed(kind, inner)
    count = HELD.get(kind, 0)
    if kind == "newton" and settings.layers != EMBEDDING:
        count = HELD_INSIDE
    if kind == "orthogonal":
        plain = _find("applied", subject, replace(settings, layers=EMBEDDING))
        nearest = nearest_first(audience, store, run, plain.update, count, settings.seed)
        held = Held(others=nearest)
    elif kind == "newton":
        held = hold(audience, store, run, list(samples.values()), count, settings.seed)
    else:
        held = NOBODY
    if kind in BASELINES:  # where their ascent begins
        direction = _find("fresh", subject, replace(settings, layers=EMBEDDING))
    else:
        direction = _find(kind, subject, settings, held)
    if (update := direction.updates.get("embedding")) is not None:
        audience = with_neighbours(audience, store, run, update, settings.seed, held.everyone)
    dose = asked or _default(direction, subject, settings)
    progress("measuring the path")
    if direction.alone:
        notes.append(
            f"tokens that stand in no other record: {direction.alone}; their rows go where they "
            "would be had nobody used them"
        )
    walk = Walk(subject.network, direction.updates, audience)
    complete = bool(run["epochs_captured"] == "all" or settings.from_checkpoints)
    target = _target(dose, walk, subject, audience, direction, settings, complete)
    if asked is None and dose.multiple and target is not None:
        made_for, dose = dose, _within(dose.multiple, target, walk)
        if dose.multiple != made_for.multiple:
            notes.append(
                f"dose {made_for.text}, which the direction is made for, would raise the loss past "
                f"the range expected of a record never trained on: it is {dose.text}"
            )
    if direction.dose and not complete and settings.dose is None:
        notes.append(
            f"epochs {run['epochs_captured']} of {run['name']} were captured; the default dose is "
            "made for all of them: see how far it came, complete them with --from-checkpoints, or "
            "give --dose target"
        )
    if not audience.of("holdout") and limits.holdout is not None:
        notes.append("no held-out samples in the store: the limit on held-out damage has no effect")
    if not audience.of("neighbour") and limits.neighbours is not None:
        notes.append("no neighbours are measured: the limit on their damage has no effect")
    moved, start = None, walk.measure(0.0)
    in_steps = kind in BASELINES or settings.iterate is not None
    if in_steps and target is not None and start.forget < target.loss:
        walk.go_to(0.0)
        if settings.iterate is None:
            moved = descend(subject, kind, settings, kept, target.loss, progress)
        else:
            n, keep = settings.iterate, not dry_run
            moved = iterate(subject, audience, kind, n, target, limits, progress, keep=keep)
        path = doses.Path([start], start, False)  # where not a single step kept to the limits
        if any(bool(update.any()) for update in moved.updates.values()):
            direction = replace(direction, updates=moved.updates)
            walk = Walk(subject.network, direction.updates, audience)
            path = doses.follow_multiple(walk.measure, 1.0, limits)
            if path.reached:
                path = replace(path, reached=moved.reached, ended=moved.ended)
    else:
        path = _follow(walk, direction, dose, target, limits)
    chosen = path.chosen
    verdict = verdict_of(path, target)
    scores = judged(_scores(walk, audience, chosen.dose), target, verdict)
    if target is not None and chosen.forget > target.high:
        lower = "--learning-rate" if kind in BASELINES else "--dose"
        notes.append(f"past the loss expected of a record never trained on: lower {lower}")
    reason = reason_of(verdict, path, target, limits, dose, scores)
    if (verdict == "partly" or not path.reached) and replayable(run):
        took = cost(run, last_before(store, run, list(store.resolve({*samples, *gone}).values())))
        notes.append(f"--exact trains {run['name']} again without the record: {took}")
    written = None if dry_run or verdict == "refused" else out
    points = walk.points(path)
    request_id, digest_out = None, None
    if not dry_run:
        mine = [audience.tokens[at] for at in audience.of("forget")]
        walk.go_to(0.0)
        before, after = token_losses(subject.network, mine), None
        if written is not None:
            walk.go_to(chosen.dose)
            after = token_losses(subject.network, mine)
            digest_out = write_checkpoint(subject.network, subject.tokenizer, out)
        request_id = record(
            store,
            {
                **subject.row(started, written, digest_out),
                "direction": kind,
                "dose_asked": dose.text,
                "dose": chosen.dose or None,
                "target": None if target is None else target.loss,
                "target_low": None if target is None else target.low,
                "target_high": None if target is None else target.high,
                "target_source": None if target is None else target.source,
                "max_holdout_increase": limits.holdout,
                "max_retained_increase": limits.single,
                "verdict": verdict,
                "reason": reason,
                "settings": catalog.as_json(
                    {
                        "weights": direction.weights,
                        "again": settings.again,
                        "max_neighbour_increase": limits.neighbours,
                        "seed": settings.seed,
                        "with_duplicates": settings.with_duplicates,
                        "layers": list(settings.layers or EMBEDDING),
                        "epochs": settings.epochs,
                        "from_checkpoints": [path.name for path in settings.from_checkpoints],
                        "iterate": settings.iterate,
                        "steps": settings.steps,
                        "learning_rate": settings.learning_rate,
                        "retained": kept_digest,
                        "notes": notes,
                    }
                ),
            },
            points,
            chosen,
            [(audience.numbers[s.id], s) for s in scores],
            columns_of(subject, before, after),
            written,
            direction.updates,
        )
        if moved is not None and moved.unfinished is not None:
            moved.unfinished.unlink(missing_ok=True)
    return Outcome(
        request_id,
        verdict,
        reason,
        run["name"],
        chosen.dose or None,
        target,
        points,
        scores,
        written,
        notes,
    )


def _find(kind: str, subject: Subject, settings: ForgetSettings, held: Held = NOBODY) -> Direction:
    return find(
        kind,
        subject.store,
        subject.run,
        list(subject.samples.values()),
        subject.network,
        held=held,
        weights=settings.weights,
        seed=settings.seed,
        checkpoints=settings.from_checkpoints,
        layers=settings.layers or EMBEDDING,
        epochs=settings.epochs,
        tokens=lambda: subject.own_tokens,
    )


def _default(direction: Direction, subject: Subject, settings: ForgetSettings) -> Dose:
    """The dose that a direction is made for, as calibrated on the run where that applies."""
    if direction.dose is None:
        return Dose.parse("target")
    times = 1.0
    if settings.plain and len(subject.samples) == 1:
        times = dose_of(subject.store, subject.run["run_id"], direction.kind)
    return Dose.parse(f"{direction.dose * times:g}")


def _within(multiple: float, target: Target, walk: Walk) -> Dose:
    """A default dose, or less where its loss lies past the range estimated for the samples."""

    def loss(part: float) -> float:
        return walk.measure(part * multiple).forget

    part = crossing(loss, target.high, LEAST, 1.0) if loss(0.0) < target.high else 1.0
    return Dose.parse(f"{multiple * part:g}")


def _follow(
    walk: Walk,
    direction: Direction,
    dose: Dose,
    target: Target | None,
    limits: Limits,
) -> doses.Path:
    if dose.multiple is not None:
        return doses.follow_multiple(walk.measure, dose.multiple, limits)
    assert target is not None
    first = direction.dose / 8 if direction.dose else walk.first_dose(target.loss)
    return doses.follow_target(walk.measure, target.loss, first, limits)


def _target(
    dose: Dose,
    walk: Walk,
    subject: Subject,
    audience: Audience,
    direction: Direction,
    settings: ForgetSettings,
    complete: bool,
) -> Target | None:
    """The loss asked for, or the best estimate that the store allows, None without any.

    The estimate is by ``applied`` whatever the request's own direction: it must not depend on what
    it is to judge.
    """
    if dose.target is not None:
        return Target.asked(dose.target)
    losses = walk.losses(0.0)
    of = {role: [losses[at] for at in audience.of(role)] for role in ROLES}
    if complete:  # then the optimizer's steps can be undone, which tells
        plain = ForgetSettings(from_checkpoints=settings.from_checkpoints)
        own = settings.plain
        with suppress(ForgetError):  # of an optimizer whose steps are not known
            if not (own and direction.kind == "applied"):
                direction = _find("applied", subject, plain)
                mine = audience.only("forget")
                walk = Walk(subject.network, direction.updates, mine)
            assert direction.dose is not None
            undone = walk.losses(direction.dose)[: len(of["forget"])]  # they stand first
            walk.go_to(0.0)
            run_id = subject.run["run_id"]
            return from_undoing(of["forget"], undone, shares_of(subject.store, run_id))
    if len(of["retained"]) > 1 and len(of["holdout"]) > 1:
        return from_held_out(*of.values())
    if dose.multiple is None:
        raise ForgetError(
            "the target cannot be estimated without held-out samples in the store: "
            "give --dose target:NATS, or ingest with --holdout"
        )
    return None


def _scores(walk: Walk, audience: Audience, dose: float) -> list[Score]:
    before, after, forecast = walk.losses(0.0), walk.losses(dose), walk.forecast
    foretold = [None] * len(before) if forecast is None else forecast.at(dose).tolist()
    return [
        Score(i, role, b, a, f)
        for (i, role), b, a, f in zip(audience.members, before, after, foretold, strict=True)
    ]


def _finite(limit: float | None) -> float | None:
    return limit if limit is not None and math.isfinite(limit) else None
