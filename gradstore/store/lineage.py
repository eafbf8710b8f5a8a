"""Where a checkpoint comes from: its run, the requests that led to it, what they made it forget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradstore.errors import ForgetError, IdError
from gradstore.store.store import Store


def run_of(store: Store, digest: str, asked: str | None) -> tuple[dict[str, Any], list[str]]:
    """The run a checkpoint comes from: by its digest, through earlier requests, else the newest."""
    if asked is not None:
        return store.run(asked), []
    for source in (
        "SELECT run_id FROM runs WHERE checkpoint_digest = ?",
        "SELECT run_id FROM requests WHERE model_out_digest = ?",
    ):
        if found := store.rows(source + " ORDER BY run_id", [digest]):
            return store.run(found[-1][0]), []
    try:
        newest = store.run()
    except IdError as error:
        raise ForgetError(f"{error}; fill the store with `gradstore ingest`") from error
    note = f"the store does not know this checkpoint; the gradients are those of {newest['name']}"
    return newest, [note]


def forgotten_before(store: Store, digest: str) -> dict[str, int]:
    """Ids that the requests leading to a checkpoint made it forget, with the last such request."""
    return dict(
        store.rows(
            """WITH RECURSIVE chain AS (
                   SELECT request_id, model_in_digest FROM requests WHERE model_out_digest = ?
                   UNION
                   SELECT r.request_id, r.model_in_digest FROM requests r
                   JOIN chain c ON r.model_out_digest = c.model_in_digest
                                   AND r.request_id < c.request_id)
               SELECT id, max(request_id) FROM chain JOIN scores USING (request_id)
               JOIN samples USING (sample_id) WHERE role = 'forget' GROUP BY id""",
            [digest],
        )
    )


def named(store: Store, given: Sequence[str]) -> tuple[dict[str, int], int | None]:
    """Samples by id, and the last request among what was given: ids, or numbers of requests.

    A number is a request unless it is some sample's whole id; it stands for the ids that the
    request was to forget. Raises :class:`IdError`.
    """
    samples: dict[str, int] = {}
    request = None
    for each in given:
        forgotten = store.rows(
            """SELECT id, sample_id FROM forgotten WHERE request_id = try_cast(? AS INTEGER)
               AND NOT EXISTS (SELECT 1 FROM samples WHERE id = ?) ORDER BY sample_id""",
            [each, each],
        )
        if forgotten:
            request = int(each)
        samples |= dict(forgotten) if forgotten else _sample(store, each)
    return samples, request


def _sample(store: Store, given: str) -> dict[str, int]:
    try:
        return store.resolve([given])
    except IdError as error:
        if not given.isdecimal():
            raise
        numbers = store.rows("SELECT DISTINCT request_id FROM forgotten ORDER BY request_id")
        known = ", ".join(str(number) for (number,) in numbers) or "none yet"
        raise IdError(f"there is no request {given} (requests: {known}), and {error}") from error
