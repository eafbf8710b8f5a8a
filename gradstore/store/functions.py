"""SQL functions over stored gradients: a statement asks by id, our code reads and computes.

The author of a statement gets no file access: DuckDB stays locked and hands over ids, whose places
are looked up on another connection. Nothing a statement defines (a temporary table named
``segments``, say) is seen there.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import duckdb
from duckdb.func import FunctionNullHandling, PythonUDFType

from gradstore.errors import GradstoreError, IdError, QueryError

if TYPE_CHECKING:  # imported by the first call: plain SQL starts without torch and Arrow
    import pyarrow

    from gradstore.factored import FactoredGradient
    from gradstore.influence.top import Scores
    from gradstore.store.catalog import Connection
    from gradstore.store.record import Sides
    from gradstore.store.store import Store

HELD_BYTES = 1 << 29  # gradients kept between calls, multiplied out
_MOST_VALUES = 1 << 20  # products kept: DuckDB may ask twice, to filter and to show
_OPTIONS = "epoch := the first stored, run := the newest"
_PAIR = "epoch := the first stored, epoch_b := epoch, run := the newest"
_TOKEN_NORMS = (
    "STRUCT(position INTEGER, token INTEGER, predicts INTEGER, d_norm DOUBLE, h_norm DOUBLE)"
)
_numbers = itertools.count(1)

Key = tuple[int, int, int]  # run_id, sample_id, epoch
Place = dict[str, Any]


@dataclass(frozen=True)
class Function:
    """A function as its caller sees it; ``columns`` are (name, type, comment)."""

    name: str
    arguments: str
    comment: str
    columns: tuple[tuple[str, str, str], ...]
    macro: str


def _number(name: str, comment: str) -> tuple[tuple[str, str, str], ...]:
    return ((name, "DOUBLE", comment),)


# Python's functions take all arguments and have a number in their name; macros give defaults.
FUNCTIONS = (
    Function(
        "grad_norm",
        f"id, {_OPTIONS}",
        "Frobenius norm of a record's embedding gradient, both sides where the head is tied to it.",
        _number("grad_norm", "The norm; NULL where no gradient is stored."),
        "(id, epoch := NULL, run := NULL) AS _grad_norm_{n}(id, epoch, run::VARCHAR)",
    ),
    Function(
        "grad_dot",
        f"a, b, {_PAIR}",
        "Inner product of two records' embedding gradients, from their factors.",
        _number("grad_dot", "The product; NULL where no gradient is stored."),
        "(a, b, epoch := NULL, epoch_b := NULL, run := NULL) AS "
        "_grad_dot_{n}(a, b, epoch, coalesce(epoch_b, epoch), run::VARCHAR)",
    ),
    Function(
        "grad_cosine",
        f"a, b, {_PAIR}",
        "Cosine of two records' embedding gradients; 0 where one of them is 0.",
        _number("grad_cosine", "The cosine; NULL where no gradient is stored."),
        "(a, b, epoch := NULL, epoch_b := NULL, run := NULL) AS "
        "_grad_cosine_{n}(a, b, epoch, coalesce(epoch_b, epoch), run::VARCHAR)",
    ),
    Function(
        "neighbours",
        f"id, k := 10, {_OPTIONS}",
        "Table: the k records whose gradients point most nearly the way of this one's.",
        (
            ("id", "VARCHAR", "The neighbour."),
            ("cosine", "DOUBLE", "grad_cosine of the two."),
        ),
        """(of_id, k := 10, epoch := NULL, run := NULL) AS TABLE
           SELECT _near.id, _near.cosine FROM (
               SELECT _other.id, _grad_cosine_{n}(of_id, _other.id, epoch, epoch, run::VARCHAR)
                      AS cosine
               FROM samples _other WHERE _other.id <> of_id) _near
           WHERE _near.cosine IS NOT NULL ORDER BY _near.cosine DESC, _near.id LIMIT k""",
    ),
    Function(
        "token_norms",
        f"id, {_OPTIONS}",
        "Table: one row per position of a record that predicts a token, with its norms.",
        (
            ("position", "INTEGER", "Position in the record, from 0."),
            ("token", "INTEGER", "Id of the token there."),
            ("predicts", "INTEGER", "Id of the token that follows."),
            ("d_norm", "DOUBLE", "Norm of the gradient at the embedding's output there."),
            ("h_norm", "DOUBLE", "|R||H| there, entries kept; NULL without the output side."),
        ),
        """(of_id, epoch := NULL, run := NULL) AS TABLE
           SELECT unnest(_token_norms_{n}(of_id, epoch, run::VARCHAR), recursive := true)""",
    ),
    Function(
        "influence",
        "id, method := 'dot', k := 10, run := the newest; or question := N",
        "Table: the k records whose steps moved this one most, scored as by `gradstore top --id`. "
        "By 'self' what its own moved, without an id those who moved themselves most. Of a "
        "question that was asked before, by its number (influence_runs), the answer that was kept.",
        (
            ("id", "VARCHAR", "The record whose steps they were."),
            ("score", "DOUBLE", "By method: dot and self in nats of the loss, or cosine."),
        ),
        """(of_id := NULL, method := 'dot', k := 10, run := NULL, question := NULL) AS TABLE
           SELECT unnest(_influence_{n}(of_id, method, k, run::VARCHAR, question),
                         recursive := true)""",
    ),
)


@contextmanager
def functions(connection: Connection, store: Store, sql: str) -> Iterator[None]:
    """Give a connection the functions that a statement may call, until the end of the block.

    A call has to spell a function's name, so a statement without any gets none. Raises the error
    (:class:`IdError`, :class:`StoreDamaged`, ...) that a function raised, in place of DuckDB's.
    """
    text = sql.lower()
    if not any(function.name in text for function in FUNCTIONS):
        yield
        return
    import numpy  # noqa: F401 (where memory ends, DuckDB would say it is not installed)

    asked, number = _Asked(store), next(_numbers)  # what Python registers, all connections see
    one, two = ["VARCHAR", "INTEGER", "VARCHAR"], ["VARCHAR"] * 2 + ["INTEGER"] * 2 + ["VARCHAR"]
    registered: dict[str, tuple[Callable[..., Any], list[Any], str]] = {
        "grad_norm": (asked.norms, one, "DOUBLE"),
        "grad_dot": (asked.dots, two, "DOUBLE"),
        "grad_cosine": (asked.cosines, two, "DOUBLE"),
        "token_norms": (asked.token_norms, one, f"{_TOKEN_NORMS}[]"),
        "influence": (
            asked.influences,
            ["VARCHAR", "VARCHAR", "INTEGER", "VARCHAR", "INTEGER"],
            "STRUCT(id VARCHAR, score DOUBLE)[]",
        ),
    }
    for name, (function, arguments, returns) in registered.items():
        connection.create_function(
            f"_{name}_{number}",
            function,
            arguments,
            returns,
            type=PythonUDFType.ARROW,
            null_handling=FunctionNullHandling.SPECIAL,
        )
    for each in FUNCTIONS:
        connection.execute(f"CREATE TEMP MACRO {each.name}{each.macro.format(n=number)}")
    try:
        yield
    except GradstoreError as error:
        if asked.failure is not None and str(asked.failure) in str(error):
            raise asked.failure from None
        raise
    finally:
        with suppress(duckdb.Error):  # raised where the statement left no transaction open
            connection.rollback()
        for name in registered:
            connection.remove_function(f"_{name}_{number}")


def _telling(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method that keeps its error in ``failure``: of an error, DuckDB passes on text alone."""

    @wraps(function)  # DuckDB looks at the number of arguments, and evaluates their annotations
    def call(self: _Asked, *columns: Any) -> Any:
        try:
            return function(self, *columns)
        except GradstoreError as error:
            self.failure = error
            raise

    return call


class _Asked:
    """What one statement asks of gradients; each is read once while those asked for fit."""

    def __init__(self, store: Store) -> None:
        self.failure: GradstoreError | None = None
        self._store = store
        self._held: OrderedDict[Key, tuple[FactoredGradient, int]] = OrderedDict()
        self._bytes = 0
        self._products: dict[tuple[Key, Key], float] = {}
        self._selves: dict[int, Scores] = {}  # by run

    # -- functions: Arrow in, Arrow out ------------------------------------------------------

    @_telling
    def norms(self, ids: Any, epochs: Any, runs: Any) -> Any:
        places = self._places(ids, epochs, runs)
        self._scan([place for place in places if place is not None])
        return _doubles(None if p is None else self._norm(p) for p in places)

    @_telling
    def dots(self, a: Any, b: Any, epochs: Any, epochs_b: Any, runs: Any) -> Any:
        pairs = zip(self._places(a, epochs, runs), self._places(b, epochs_b, runs), strict=True)
        return _doubles(None if p is None or q is None else self._dot(p, q) for p, q in pairs)

    @_telling
    def cosines(self, a: Any, b: Any, epochs: Any, epochs_b: Any, runs: Any) -> Any:
        pairs = zip(self._places(a, epochs, runs), self._places(b, epochs_b, runs), strict=True)
        return _doubles(None if p is None or q is None else self._cosine(p, q) for p, q in pairs)

    @_telling
    def token_norms(self, ids: Any, epochs: Any, runs: Any) -> Any:
        import pyarrow

        places = self._places(ids, epochs, runs)
        rows = [None if place is None else self._token_norms(place) for place in places]
        integers = {name: pyarrow.int32() for name in ("position", "token", "predicts")}
        doubles = {name: pyarrow.float64() for name in ("d_norm", "h_norm")}
        of = pyarrow.struct([*integers.items(), *doubles.items()])
        return pyarrow.array(rows, pyarrow.list_(of))

    @_telling
    def influences(self, ids: Any, methods: Any, counts: Any, runs: Any, questions: Any) -> Any:
        import pyarrow

        columns = (ids, methods, counts, runs, questions)
        asked = zip(*(column.to_pylist() for column in columns), strict=True)
        of = pyarrow.struct({"id": pyarrow.string(), "score": pyarrow.float64()}.items())
        return pyarrow.array([self._influence(*row) for row in asked], pyarrow.list_(of))

    # -- algebra -----------------------------------------------------------------------------

    def _scan(self, places: list[Place]) -> None:
        """Take in the norms of records that are not known yet, a segment at a time."""
        from gradstore.influence.norms import norms_segment
        from gradstore.influence.rows import Place as At

        new = {
            key: place
            for place in places
            if (key := _key(place)) not in self._held and (key, key) not in self._products
        }
        if len(self._products) + len(new) > _MOST_VALUES:
            self._products.clear()
        sides: Sides | None = None if self._store.model.tied else "input"
        of_segment: dict[int, list[Place]] = {}
        for place in new.values():
            of_segment.setdefault(place["segment_id"], []).append(place)
        for number, some in of_segment.items():
            where = [At(*(p[f] for f in At._fields)) for p in some]
            found = norms_segment(self._store.segment(number), where, sides)
            for place, norm in zip(some, found.tolist(), strict=True):
                self._products[_key(place), _key(place)] = norm**2

    def _norm(self, place: Place) -> float:
        return math.sqrt(max(self._dot(place, place), 0.0))

    def _cosine(self, a: Place, b: Place) -> float:
        norms = self._norm(a) * self._norm(b)
        return self._dot(a, b) / norms if norms else 0.0

    def _dot(self, a: Place, b: Place) -> float:
        first, second = sorted((a, b), key=_key)
        pair = _key(first), _key(second)
        if pair not in self._products:
            if len(self._products) >= _MOST_VALUES:
                self._products.clear()
            self._products[pair] = self._gradient(first).dot(self._gradient(second))
        return self._products[pair]

    def _gradient(self, place: Place) -> FactoredGradient:
        if (key := _key(place)) not in self._held:
            gradient = self._store.record_at(place).gradient(self._store.model)
            self._held[key] = gradient, _bytes(gradient)
            self._bytes += self._held[key][1]
        self._held.move_to_end(key)
        while self._bytes > HELD_BYTES and len(self._held) > 2:  # two make a product
            self._bytes -= self._held.popitem(last=False)[1][1]
        return self._held[key][0]

    def _token_norms(self, place: Place) -> list[dict[str, Any]]:
        record = self._store.record_at(place)
        tokens, count = record.tokens.tolist(), len(record.D)
        sizes = [None] * count if record.output is None else record.output.squares().sqrt().tolist()
        columns = {
            "position": range(count),
            "token": tokens[:-1],
            "predicts": tokens[1:],
            "d_norm": record.D.float().norm(dim=1).tolist(),
            "h_norm": sizes,
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _influence(
        self, id: str | None, method: Any, count: int | None, run: str | None, question: int | None
    ) -> list[dict[str, Any]] | None:
        from gradstore.influence.query import of_sample  # a scan of the store, which it opens
        from gradstore.influence.questions import kept
        from gradstore.influence.top import Settings, influences

        if question is not None and id is not None:
            raise QueryError("influence() is of an id or of a question that was asked, not of both")
        if question is not None:
            answers = kept(self._store, question, count)
            return [{"id": of, "score": score} for of, score in answers]
        if method not in ("dot", "cosine", "self"):
            raise QueryError(f"influence() scores by 'dot', 'cosine' or 'self', not by {method!r}")
        place = None if id is None else self._find([id], run, None)[id]
        if place is None and (id is not None or method != "self"):
            return None
        facts = self._store.run(run)
        if method == "self":
            number = facts["run_id"]
            if number not in self._selves:
                [self._selves[number]] = influences(self._store, [], Settings("self"), run=number)
            scores = self._selves[number]
            if place is not None:
                scores = scores.without(set(scores.sample_ids) - {place["sample_id"]})
        elif id is not None and place is not None:
            query = of_sample(self._store, facts, id)
            [scores] = influences(self._store, [query], Settings(method), run=facts["run_id"])
            scores = scores.without([place["sample_id"]])
        best = dict(zip(scores.sample_ids[:count], scores.values[:count], strict=True))
        names = dict(
            self._store.rows(
                "SELECT sample_id, id FROM samples WHERE list_contains(?, sample_id)", [list(best)]
            )
        )
        return [{"id": names[sample], "score": score} for sample, score in best.items()]

    # -- places ------------------------------------------------------------------------------

    def _places(self, ids: Any, epochs: Any, runs: Any) -> list[Place | None]:
        """Where each gradient lies; None for a NULL id, or one without a gradient there."""
        asked = list(zip(*(a.to_pylist() for a in (ids, epochs, runs)), strict=True))
        wanted: dict[tuple[str | None, int | None], set[str]] = {}
        for id, epoch, run in asked:
            if id is not None:
                wanted.setdefault((run, epoch), set()).add(id)
        found = {key: self._find(sorted(some), *key) for key, some in wanted.items()}
        return [None if id is None else found[run, epoch][id] for id, epoch, run in asked]

    def _find(self, ids: list[str], run: str | None, epoch: int | None) -> dict[str, Place | None]:
        rows = self._store.table(
            """SELECT asked.id AS asked, s.sample_id AS known, s.id, e.*
               FROM (SELECT unnest(?::VARCHAR[]) AS id) asked
               LEFT JOIN samples s ON s.id = asked.id
               LEFT JOIN exposures e ON e.sample_id = s.sample_id AND e.run_id = ?
                    AND e.epoch = coalesce(?, e.epoch)
               QUALIFY row_number() OVER (PARTITION BY asked.id ORDER BY e.epoch) = 1""",
            [ids, self._store.run(run)["run_id"], epoch],
        )
        for row in rows:
            if row["known"] is None:
                raise IdError(
                    f"no sample has the id {row['asked']!r}; list them with `gradstore list` "
                    "(in SQL, ids are not abbreviated)"
                )
        return {row["asked"]: row if row["epoch"] is not None else None for row in rows}


def _key(place: Place) -> Key:
    return place["run_id"], place["sample_id"], place["epoch"]


def _bytes(gradient: FactoredGradient) -> int:
    """At most what a gradient holds once its sparse terms are multiplied out."""
    height, width = gradient.shape
    touched = sum(term.index.numel() for term in gradient.terms if term.index is not None)
    factors = sum(4 * (term.value.numel() + term.B.numel()) for term in gradient.terms)
    return 4 * width * min(height, touched) + factors


def _doubles(values: Iterator[float | None]) -> pyarrow.Array:
    import pyarrow

    return pyarrow.array(list(values), pyarrow.float64())
