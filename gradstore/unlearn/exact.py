"""Exact forgetting: train the run again from its start, the samples' contribution left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradstore.errors import ForgetError
from gradstore.evaluate.audience import Audience
from gradstore.evaluate.loss import sample_losses, token_losses
from gradstore.store import catalog
from gradstore.store.store import Store
from gradstore.training.ingest import Progress
from gradstore.training.replay import Replay, parent, prepare, train_without
from gradstore.unlearn.request import (
    Outcome,
    Score,
    Subject,
    duplicates,
    record,
    write_checkpoint,
)
from gradstore.unlearn.settings import ForgetSettings
from gradstore.unlearn.tokens import columns_of

DIRECTION = "exact"


def forget_exactly(
    store: Store,
    ids: Sequence[str],
    model: Path,
    out: Path,
    settings: ForgetSettings | None = None,
    *,
    dry_run: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    steps: Progress | None = None,
) -> Outcome:
    """Train the run that ``model`` comes from again without samples; write the result to ``out``.

    It goes on from the last checkpoint that the run saved before it met any of them, else from its
    start. Order, batches, denominators, seeds and schedule stay as they were
    (:func:`gradstore.training.ingest.train`): on the same machine and versions the weights are, bit
    for bit, those of that training. What earlier requests took out of ``model`` is left out too.
    Of ``settings``, ``run``, ``seed`` and ``with_duplicates`` count. ``steps(step, steps)`` is
    called after each optimizer step. With ``dry_run`` all is trained and measured, nothing written.

    Returns the outcome, whose verdict is always ``forgotten``; losses are in nats per token. Raises
    :class:`IdError`, :class:`ModelError`, or :class:`ForgetError` where the run cannot be replayed
    or did not meet the samples.
    """
    settings = settings or ForgetSettings()
    started = time.monotonic()
    subject = Subject.open(store, ids, model, out, settings.run)
    run, samples, notes = subject.run, subject.samples, subject.notes
    if settings.with_duplicates:
        samples |= duplicates(store, run, samples, dry_run, progress)
    replay = prepare(store, run)
    gone = [i for i in subject.gone if i in replay.tokens.keys() - samples]
    if gone:  # a replay would bring them back
        notes.append(f"forgotten earlier, so left out too: {', '.join(sorted(gone))}")
        samples |= store.resolve(sorted(gone))
    _check_met(store, run, samples, replay)
    notes += replay.notes
    audience = Audience.choose(store, run, samples, settings.seed)
    before = sample_losses(subject.network, audience.tokens).tolist()
    mine = [audience.tokens[at] for at in audience.of("forget")]
    tokens_before = token_losses(subject.network, mine)
    subject = replace(subject, network=None)  # training needs the room
    notes += train_without(store, run, replay, samples, progress, steps)
    after = sample_losses(replay.model, audience.tokens).tolist()
    scores = [
        Score(i, role, b, a, outcome="forgotten" if role == "forget" else None)
        for (i, role), b, a in zip(audience.members, before, after, strict=True)
    ]
    reason = _reason(run, scores)
    request_id = None
    if not dry_run:
        digest_out = write_checkpoint(replay.model, subject.tokenizer, out)
        tokens_after = token_losses(replay.model, mine)
        request_id = record(
            store,
            {
                **subject.row(started, out, digest_out),
                "direction": DIRECTION,
                "dose_asked": DIRECTION,
                "dose": None,
                "target": None,
                "max_holdout_increase": None,
                "verdict": "forgotten",
                "reason": reason,
                "settings": catalog.as_json(
                    {
                        "seed": settings.seed,
                        "with_duplicates": settings.with_duplicates,
                        "notes": notes,
                    }
                ),
            },
            [],
            None,
            [(audience.numbers[s.id], s) for s in scores],
            columns_of(subject, tokens_before, tokens_after),
            out,
            None,
        )
    written = None if dry_run else out
    return Outcome(
        request_id, "forgotten", reason, run["name"], None, None, [], scores, written, notes
    )


def _check_met(
    store: Store, run: Mapping[str, Any], samples: Mapping[str, int], replay: Replay
) -> None:
    """Refuse samples that leaving out of this run alone would not take out of the model."""
    if strangers := sorted(samples.keys() - replay.tokens.keys()):
        raise ForgetError(
            f"{run['name']} was not trained on {strangers[0]!r}, so there is nothing to leave out; "
            f"`gradstore show {strangers[0]}` names the runs that met it, choose one with --run"
        )
    before = parent(store, run)
    while before is not None:
        met = store.rows(
            """SELECT DISTINCT id FROM exposures JOIN samples USING (sample_id)
               WHERE run_id = ? AND list_contains(?, sample_id) ORDER BY id""",
            [before["run_id"], list(samples.values())],
        )
        if met:
            raise ForgetError(
                f"{run['name']} started from weights that {before['name']} had trained on "
                f"{met[0][0]!r}, which replaying {run['name']} would leave in: first "
                f"`gradstore forget {met[0][0]} --exact --model {before['checkpoint']} "
                "--out NEW`, then `gradstore ingest --model NEW` without the record"
            )
        before = parent(store, before)


def _reason(run: Mapping[str, Any], scores: Sequence[Score]) -> str:
    said = f"trained again without it ({run['name']}, {run['steps']} steps)"
    for role, name in (("forget", "loss"), ("retained", "retained"), ("holdout", "held-out")):
        of = [score for score in scores if score.role == role]
        before, after = (
            sum(values) / len(of) if of else 0.0
            for values in ([s.before for s in of], [s.after for s in of])
        )
        if role == "forget":
            said += f": {name} {before:.3f} to {after:.3f} nats per token"
        elif of:
            said += f", {name} {after - before:+.4f}"
    return said
