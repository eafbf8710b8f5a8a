"""Questions that were asked, with their answers, in the catalog."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from gradstore.errors import QueryError
from gradstore.influence.top import Scores
from gradstore.store import catalog
from gradstore.store.store import Store

KEPT = 100_000  # scores of one question that the catalog takes whole


def record_scores(store: Store, scores: Scores, shown: Sequence[int]) -> int:
    """Add rows to ``influence_runs`` and ``influences``; returns the question's number.

    All scores, or those of the ``shown`` records where there are more than 100,000.
    """
    answers = zip(scores.sample_ids, scores.values, strict=True)
    ranked = [(sample, score, rank) for rank, (sample, score) in enumerate(answers, 1)]
    if len(ranked) > KEPT:
        wanted = set(shown)
        ranked = [row for row in ranked if row[0] in wanted]
    query = scores.query
    bent = asdict(query.bent) if query is not None and query.bent is not None else {}
    if query is not None and query.layers:
        bent["layers"] = [layer.layer for layer in query.layers]
    asked = [query.sample] if query and query.sample is not None else []
    with store.transaction() as connection:
        catalog.check_there(connection, [sample for sample, _, _ in ranked], asked)
        [(number,)] = connection.execute(
            "SELECT coalesce(max(influence_id), 0) + 1 FROM influence_runs"
        ).fetchall()
        row = {
            "influence_id": number,
            "created_at": catalog.now(),
            "run_id": scores.run["run_id"],
            "method": scores.settings.method,
            "query": "all" if query is None else query.name,
            "settings": catalog.as_json(asdict(scores.settings) | bent),
            "model_digest": None if query is None else query.model_digest,
        }
        catalog.insert(connection, "influence_runs", {name: [of] for name, of in row.items()})
        columns = {
            "influence_id": [number] * len(ranked),
            "sample_id": [sample for sample, _, _ in ranked],
            "score": [score for _, score, _ in ranked],
            "rank": [rank for _, _, rank in ranked],
        }
        catalog.insert(connection, "influences", columns)
    return int(number)


def kept(store: Store, number: int, count: int | None = None) -> list[tuple[str, float]]:
    """Ids and scores that answered a question, the highest first, all or ``count`` of them.

    Raises :class:`QueryError` for a question that was not kept.
    """
    if not store.rows("SELECT 1 FROM influence_runs WHERE influence_id = ?", [number]):
        raise QueryError(
            f"no question {number} was kept; those that were are in influence_runs "
            "(`gradstore top` asks them)"
        )
    rows: list[tuple[str, float]] = store.rows(
        """SELECT id, score FROM influences JOIN samples USING (sample_id)
           WHERE influence_id = ? ORDER BY rank""",
        [number],
    )
    return rows[:count]
