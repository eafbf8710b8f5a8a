"""All requests with their statutory clock: GDPR Art. 12(3) gives one month from receipt.

The month ends on the same day of the next one, or on its last if it has none such (Regulation
1182/71, Art. 3). The store knows when a request was first run, not when the person wrote.
"""

from __future__ import annotations

from calendar import monthrange
from dataclasses import dataclass
from datetime import date, datetime, timedelta

from gradstore.store.store import Store


@dataclass(frozen=True)
class Row:
    """A request: when it came, when it is due, when all its records were forgotten, if ever."""

    number: int
    names: tuple[str, ...]
    run: str
    direction: str
    verdict: str
    before: float | None
    after: float | None
    received: datetime
    due: date
    done: datetime | None
    today: date

    @property
    def days(self) -> int:
        """Days left, counted from when it was done or from today; negative when late."""
        return (self.due - (self.today if self.done is None else self.done.date())).days

    @property
    def standing(self) -> str:
        """How it stands, in words."""
        late = f"{-self.days} day{'s' * (self.days != -1)}"
        if self.done is not None:
            return "done" if self.days >= 0 else f"done {late} late"
        if self.days >= 0:
            return f"open, {self.days} day{'s' * (self.days != 1)} left"
        return f"overdue by {late}"


def one_month_after(day: date) -> date:
    """The last day of a period of one month that begins with ``day``."""
    year, month = (day.year + day.month // 12, day.month % 12 + 1)
    return date(year, month, min(day.day, monthrange(year, month)[1]))


def gather(store: Store, today: date) -> tuple[Row, ...]:
    """Every request, the newest first; ``today`` (UTC) tells what is overdue."""
    requests = store.table(
        """SELECT requests.*, runs.name AS run, before, after, ids, outcomes
           FROM requests JOIN runs USING (run_id)
           LEFT JOIN (SELECT request_id, avg(before) AS before, avg(after) AS after,
                             list(id ORDER BY sample_id) AS ids,
                             list(outcome ORDER BY sample_id) AS outcomes
                      FROM scores JOIN samples USING (sample_id)
                      WHERE role = 'forget' AND metric = 'loss' GROUP BY request_id)
               USING (request_id)
           ORDER BY request_id"""
    )
    first: dict[tuple[int, str], datetime] = {}  # when a run was first asked to forget a record
    done: dict[tuple[int, str], datetime] = {}
    for request in requests:
        for name, outcome in zip(request["ids"] or (), request["outcomes"] or (), strict=True):
            key = request["run_id"], name
            first.setdefault(key, request["created_at"])
            if (outcome or request["verdict"]) == "forgotten":
                done.setdefault(key, request["created_at"] + timedelta(seconds=request["seconds"]))
    found = []
    for request in requests:
        names = tuple(request["ids"] or ())
        keys = [(request["run_id"], name) for name in names]
        received = min((first[key] for key in keys), default=request["created_at"])
        known = [done[key] for key in keys if key in done]
        found.append(
            Row(
                request["request_id"],
                names,
                request["run"],
                request["direction"],
                request["verdict"],
                request["before"],
                request["after"],
                received,
                one_month_after(received.date()),
                max(known) if names and len(known) == len(names) else None,
                today,
            )
        )
    return tuple(reversed(found))
