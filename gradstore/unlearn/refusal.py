"""A request of which nothing is left to do."""

from __future__ import annotations

from gradstore.evaluate.audience import Audience
from gradstore.evaluate.loss import sample_losses, token_losses
from gradstore.store import catalog
from gradstore.unlearn.request import Outcome, Score, Subject, record
from gradstore.unlearn.tokens import columns_of


def refuse(subject: Subject, kind: str, dose: str, started: float, dry_run: bool) -> Outcome:
    """The outcome of a request for samples that are all gone already: recorded, nothing written.

    The reason names no ids, which an erasure would have to find.
    """
    requests = ", ".join(map(str, sorted({subject.gone[i] for i in subject.samples})))
    reason = (
        f"forgotten already, by request {requests}, on the way to this checkpoint: there is "
        "nothing left to forget"
    )
    audience = Audience.choose(subject.store, subject.run, subject.samples, 0).only("forget")
    losses = sample_losses(subject.network, audience.tokens).tolist()
    scores = [
        Score(i, role, loss, loss) for (i, role), loss in zip(audience.members, losses, strict=True)
    ]
    number = None
    if not dry_run:
        row = {
            **subject.row(started, None, None),
            "direction": kind,
            "dose_asked": dose,
            "verdict": "refused",
            "reason": reason,
            "settings": catalog.as_json({"notes": subject.notes}),
        }
        tokens = columns_of(subject, token_losses(subject.network, audience.tokens), None)
        scored = [(audience.numbers[score.id], score) for score in scores]
        number = record(subject.store, row, [], None, scored, tokens, None, None)
    name = subject.run["name"]
    return Outcome(number, "refused", reason, name, None, None, [], scores, None, subject.notes)
