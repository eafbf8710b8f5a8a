"""SQL functions over gradients: equal to the algebra, each record read once, sandbox as it was."""

import math
from pathlib import Path

import pytest
import torch
from records import RUN, WIDTH, record, tail
from tiny import Tiny, refused, run, run_json

from gradstore import FactoredGradient, Store
from gradstore.errors import IdError, QueryError, StoreDamaged
from gradstore.store import catalog
from gradstore.store import functions as module
from gradstore.store.format import ModelIdentity
from gradstore.store.record import Record
from gradstore.store.segment import SegmentReader
from gradstore.store.writer import SegmentWriter

pytest_plugins = ["tiny"]
MODEL = ModelIdentity("GPT2LMHeadModel", 500, WIDTH, WIDTH, 64, True, "tokens-a")


def gradients(store: Store, epoch: int = 1) -> dict[str, FactoredGradient]:
    """The gradients of all training samples at one epoch, by id."""
    numbers = [number for (number,) in store.rows("SELECT sample_id FROM samples")]
    return {
        one.exposure.id: one.gradient(store.model)
        for one in store.records(numbers, 1)
        if one.exposure.epoch == epoch
    }


@pytest.fixture
def asked(trained: Tiny) -> Store:
    return Store.open(trained.store)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids and epochs of the records that are read."""
    seen: list[str] = []
    read = SegmentReader.record

    def noting(
        reader: SegmentReader, exposure: object, place: dict[str, object], layers: object
    ) -> Record:
        seen.append(f"{place['id']} {place['epoch']}")
        return read(reader, exposure, place, layers)  # type: ignore[arg-type]

    monkeypatch.setattr(SegmentReader, "record", noting)
    return seen


def test_norms_are_those_of_the_dense_gradients(asked: Store) -> None:
    _, rows = asked.query("SELECT id, epoch, grad_norm(id, epoch := epoch) FROM exposures "
                          "JOIN samples USING (sample_id)")  # fmt: skip
    dense = {e: {i: g.dense() for i, g in gradients(asked, e).items()} for e in (1, 2)}
    assert len(rows) == 48
    for id, epoch, norm in rows:
        assert norm == pytest.approx(dense[epoch][id].norm().item(), rel=1e-5)


def test_products_and_cosines_are_those_of_the_dense_gradients(asked: Store) -> None:
    _, rows = asked.query(
        """SELECT a.id, b.id, grad_dot(a.id, b.id), grad_cosine(a.id, b.id),
                  grad_cosine(a.id, b.id, 1, 2)
           FROM samples a, samples b WHERE a.split = 'train' AND b.split = 'train'"""
    )
    first, second = ({i: g.dense() for i, g in gradients(asked, e).items()} for e in (1, 2))
    cosine = torch.nn.functional.cosine_similarity
    assert len(rows) == 24**2
    for a, b, dot, near, later in rows:
        assert dot == pytest.approx((first[a] * first[b]).sum().item(), rel=1e-3, abs=1e-4)
        assert near == pytest.approx(cosine(first[a].ravel(), first[b].ravel(), 0).item(), abs=1e-5)
        assert later == pytest.approx(
            cosine(first[a].ravel(), second[b].ravel(), 0).item(), abs=1e-5
        )
    assert all(near == pytest.approx(1) for a, b, _, near, _ in rows if a == b)


def test_neighbours_are_the_records_of_greatest_cosine(asked: Store) -> None:
    _, cosines = asked.query(
        "SELECT id, grad_cosine('p-07', id) AS c FROM samples WHERE split = 'train' "
        "AND id <> 'p-07' ORDER BY c DESC"
    )
    assert asked.query("SELECT * FROM neighbours('p-07', 5)")[1] == cosines[:5]
    assert asked.query("SELECT * FROM neighbours('p-07')")[1] == cosines[:10]
    assert asked.query("SELECT * FROM neighbours('p-07', k := 99)")[1] == cosines
    second = gradients(asked, 2)
    [(id, near)] = asked.query("SELECT * FROM neighbours('p-07', 1, epoch := 2)")[1]
    of = second.pop("p-07")
    nearest = max(second, key=lambda i: second[i].dot(of) / second[i].norm())
    assert id == nearest
    assert near == pytest.approx(of.dot(second[id]) / of.norm() / second[id].norm())


def test_neighbours_of_many_in_one_statement(asked: Store) -> None:
    columns, rows = asked.query(
        """SELECT s.id, n.id AS near, n.cosine FROM samples s, neighbours(s.id, 2) n
           WHERE s.id IN ('p-01', 'p-02') ORDER BY s.id, n.cosine DESC"""
    )
    assert columns == ["id", "near", "cosine"]
    for id in ("p-01", "p-02"):
        alone = asked.query(f"SELECT * FROM neighbours('{id}', 2)")[1]
        assert [(near, cosine) for of, near, cosine in rows if of == id] == alone


@pytest.mark.parametrize("method", ["dot", "cosine"])
def test_influence_is_what_top_finds(method: str, trained: Tiny, asked: Store) -> None:
    top = ("top", "--id", "p-07", "--method", method, "-s", trained.store, "--dry-run")
    found = [(row["id"], pytest.approx(row["score"])) for row in run_json(*top, "-k", 99)]
    assert len(found) == 23
    assert asked.query(f"SELECT * FROM influence('p-07', '{method}', 99)")[1] == found
    assert asked.query(f"SELECT * FROM influence('p-07', '{method}', run := 1)")[1] == found[:10]
    _, joined = asked.query(
        f"""SELECT s.id, i.id, i.score FROM samples s, influence(s.id, '{method}', 1) i
            WHERE s.id IN ('p-07', 'h-01')"""
    )
    assert joined == [("p-07", *found[0])]


def test_influence_by_self(trained: Tiny, asked: Store) -> None:
    top = ("top", "--method", "self", "-s", trained.store, "--dry-run", "-k", 24)
    found = [(row["id"], pytest.approx(row["score"])) for row in run_json(*top)]
    assert asked.query("SELECT * FROM influence(method := 'self', k := 99)")[1] == found
    assert asked.query("SELECT * FROM influence(method := 'self')")[1] == found[:10]
    assert asked.query(f"SELECT * FROM influence('{found[5][0]}', 'self')")[1] == [found[5]]
    _, joined = asked.query("SELECT s.id, i.score FROM samples s, influence(s.id, 'self') i")
    assert sorted(joined) == sorted(found, key=lambda row: row[0])
    assert asked.query("SELECT * FROM influence('h-01', 'self')")[1] == []


def test_a_question_of_yesterday_is_asked_again(copied: Tiny) -> None:
    top = ("top", "--text", "Ada is a baker", "-s", copied.store, "--method", "newton")
    rows = run_json(*top, "-k", 24)
    store = Store.open(copied.store)
    kept = [(row["id"], row["score"]) for row in rows]
    assert store.query("SELECT * FROM influence(question := 1, k := 5)")[1] == kept[:5]
    assert store.query("SELECT * FROM influence(question := 1, k := NULL)")[1] == kept
    _, joined = store.query(
        """SELECT r.method, i.id FROM influence_runs r, influence(question := r.influence_id) i"""
    )
    assert sorted(joined) == sorted(("newton", id) for id, _ in kept[:10])
    with pytest.raises(QueryError, match="no question 2 was kept"):
        store.query("SELECT * FROM influence(question := 2)")
    with pytest.raises(QueryError, match="not of both"):
        store.query("SELECT * FROM influence('p-01', question := 1)")


def test_influence_that_cannot_be_asked_for(asked: Store) -> None:
    with pytest.raises(QueryError, match="scores by 'dot', 'cosine' or 'self', not by 'newton'"):
        asked.query("SELECT * FROM influence('p-07', 'newton')")
    with pytest.raises(IdError, match="no sample has the id 'p-0'"):
        asked.query("SELECT * FROM influence('p-0')")
    assert asked.query("SELECT * FROM influence(NULL)")[1] == []


def test_token_norms_add_up_to_those_of_the_catalog(asked: Store) -> None:
    [(number,)] = asked.rows("SELECT sample_id FROM samples WHERE id = 'p-03'")
    _, two = asked.records([number], 1)
    columns, rows = asked.query("SELECT * FROM token_norms('p-03', epoch := 2)")
    assert columns == ["position", "token", "predicts", "d_norm", "h_norm"]
    assert [row[0] for row in rows] == list(range(len(two.D)))
    assert [row[1] for row in rows] == two.tokens[:-1].tolist()
    assert [row[2] for row in rows] == two.tokens[1:].tolist()
    for row, d in zip(rows, two.D.float(), strict=True):
        assert row[3] == pytest.approx(d.norm().item(), rel=1e-6)
    assert two.exposure.h_norm is not None
    assert math.hypot(*(row[3] for row in rows)) == pytest.approx(two.exposure.d_norm, rel=1e-2)
    assert math.hypot(*(row[4] for row in rows)) == pytest.approx(two.exposure.h_norm, rel=1e-5)
    _, (longest,) = asked.query(
        "SELECT s.id, max(t.d_norm) FROM samples s, token_norms(s.id, 2) t GROUP BY ALL "
        "HAVING s.id = 'p-03'"
    )
    assert longest == ("p-03", pytest.approx(max(row[3] for row in rows)))


def test_they_work_in_where_and_joined_with_the_catalog(asked: Store) -> None:
    _, rows = asked.query(
        """SELECT id, g.epoch, loss FROM gradients g
           WHERE grad_norm(id, epoch, run) > (SELECT median(grad_norm(id, epoch, run_id))
                                              FROM gradients)"""
    )
    norms = {(i, e): g.norm() for e in (1, 2) for i, g in gradients(asked, e).items()}
    half = sorted(norms.values())[23:25]
    assert {(id, epoch) for id, epoch, _ in rows} == {
        key for key, norm in norms.items() if norm > sum(half) / 2
    }


def test_each_record_is_read_once(asked: Store, reads: list[str]) -> None:
    query = """SELECT a.id, grad_norm(a.id) AS norm, grad_cosine(a.id, b.id) AS cosine
               FROM samples a, samples b
               WHERE a.split = 'train' AND b.split = 'train' AND cosine > 0.1"""
    assert asked.query(query)[1]
    assert sorted(reads) == [f"p-{n:02d} 1" for n in range(1, 25)]


def test_norms_are_read_a_segment_at_a_time(asked: Store, reads: list[str]) -> None:
    [(count,)] = asked.query("SELECT count(grad_norm(id, epoch)) FROM gradients")[1]
    assert (count, reads) == (48, [])


def test_what_does_not_fit_is_read_again(
    asked: Store, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    query = """SELECT sum(grad_dot(a.id, b.id)) FROM samples a, samples b
               WHERE a.id < 'p-06' AND b.id < 'p-06' AND a.id LIKE 'p%' AND b.id LIKE 'p%'"""
    [(expected,)] = asked.query(query)[1]
    assert len(reads) == 5
    monkeypatch.setattr(module, "HELD_BYTES", 0)
    assert asked.query(query)[1] == [(expected,)]
    assert len(reads) > 10


def test_a_statement_without_them_reads_nothing_and_knows_none(
    asked: Store, reads: list[str]
) -> None:
    assert asked.query("SELECT count(*) FROM samples")[1] == [(32,)]
    known = "SELECT count(*) FROM duckdb_functions() WHERE function_name ^@ '_grad'"
    assert asked.query(known)[1] == [(0,)]
    assert asked.query("SELECT grad_dot('p-01', 'p-01')")[1]
    assert asked.query(known)[1] == [(0,)]
    assert reads == ["p-01 1"]


def test_no_gradient_is_null_and_an_unknown_id_an_error(asked: Store) -> None:
    _, [row] = asked.query(
        """SELECT grad_norm(NULL), grad_norm('h-01'), grad_norm('p-01', epoch := 9),
                  grad_cosine('p-01', 'h-01'), grad_dot(NULL, 'p-01')"""
    )
    assert row == (None,) * 5
    assert asked.query("SELECT * FROM token_norms('h-01')")[1] == []
    assert asked.query("SELECT * FROM neighbours('h-01')")[1] == []
    for query in (
        "SELECT grad_norm('p-99')",
        "SELECT grad_cosine('p-01', 'p-99')",
        "SELECT * FROM neighbours('p-99')",
        "SELECT * FROM token_norms('p-99')",
    ):
        with pytest.raises(IdError, match="no sample has the id 'p-99'; list them with"):
            asked.query(query)
    with pytest.raises(IdError, match="the store has no run 'other'; it has: run-1"):
        asked.query("SELECT grad_norm('p-01', run := 'other')")
    with pytest.raises(QueryError, match="nothing"):
        asked.query("SELECT grad_norm(nothing) FROM samples")
    assert asked.query("SELECT grad_norm('p-01', run := 1) = grad_norm('p-01', run := 'run-1')")[
        1
    ] == [(True,)]


def test_an_error_that_was_caught_in_sql_is_not_the_one_told(asked: Store) -> None:
    assert asked.query("SELECT try(grad_norm('p-99'))")[1] == [(None,)]
    with pytest.raises(QueryError, match="Could not convert"):
        asked.query("SELECT id::INTEGER, try(grad_norm('p-99')) FROM samples")


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("BEGIN; SELECT grad_norm('p-01'); SELECT nothing FROM samples", QueryError),
        ("BEGIN; SELECT grad_norm('p-99')", IdError),
    ],
)
def test_a_transaction_left_open_is_ended(asked: Store, query: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        asked.query(query)
    assert asked.query("BEGIN; SELECT grad_norm('p-01') > 0")[1] == [(True,)]
    left = "SELECT count(*) FROM duckdb_functions() WHERE starts_with(function_name, '_grad')"
    assert asked.query(left)[1] == [(0,)]


def test_ids_are_data(tmp_path: Path) -> None:
    nasty = ["'; DROP TABLE samples; --", "../../etc/passwd", "p-0", 'a"b', "é\n", "%"]
    with Store.create(tmp_path / "store", dtype="float32") as store:
        store.bind(MODEL, "here")
        writer = SegmentWriter(store, store.begin_run(RUN))
        shared = tail()
        writer.put([record(id, tail=shared) for id in nasty])
        writer.close()
        norms = dict(store.query("SELECT id, grad_norm(id) FROM samples")[1])
        for id in nasty:
            quoted = f"{id}?".replace("'", "''")
            with pytest.raises(IdError, match="no sample has the id"):
                store.query(f"SELECT grad_norm('{quoted}')")
    for id in nasty:
        expected = record(id, tail=tail()).gradient(MODEL).norm()
        assert norms[id] == pytest.approx(expected, rel=1e-4)


def test_the_newest_run_answers_unless_another_is_named(store: Store) -> None:
    store.bind(MODEL, "here")
    for epoch in (1, 2):  # of another run each
        writer = SegmentWriter(store, store.begin_run(RUN | {"name": f"take {epoch}"}))
        writer.put([record("a", epoch=epoch)])
        writer.close()
    first, second = (record("a", epoch=epoch).gradient(MODEL).norm() for epoch in (1, 2))
    [row] = store.query(
        """SELECT grad_norm('a'), grad_norm('a', run := 1), grad_norm('a', run := 'take 2'),
                  grad_norm('a', 1)"""
    )[1]
    assert row == (pytest.approx(second), pytest.approx(first), pytest.approx(second), None)
    query = "SELECT epoch, grad_norm(id, run := run) FROM gradients ORDER BY epoch"
    assert store.query(query)[1] == [(1, pytest.approx(first)), (2, pytest.approx(second))]
    columns, [token, *_] = store.query("SELECT * FROM token_norms('a')")
    assert token[columns.index("h_norm")] is None  # only the input side was stored


@pytest.mark.parametrize(
    "query",
    [
        "SELECT grad_norm('p-01'), content FROM read_text('{folder}/secret')",
        "SELECT * FROM neighbours('p-01'), read_blob('{folder}/secret')",
        "SELECT grad_norm(content) FROM read_text('{folder}/secret')",
        "COPY (SELECT grad_norm('p-01')) TO '{folder}/x.csv'",
        "SELECT grad_norm('p-01'); ATTACH '{folder}/x.duckdb'",
        "SELECT grad_norm('p-01'); SET enable_external_access = true",
        "SELECT grad_norm('p-01'); SET lock_configuration = false",
        "SELECT grad_norm('p-01'); DELETE FROM samples",
        "SELECT grad_norm('p-01'); INSTALL httpfs",
        "SELECT grad_norm('p-01') FROM '{folder}/secret'",
        "SELECT grad_norm(id) FROM asked",
        "SELECT grad_norm('p-01') FROM registered",
    ],
)
def test_a_statement_with_functions_gets_no_more_than_one_without(
    query: str, copied: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("p-01")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(QueryError):
        Store.open(copied.store).query(query.format(folder=tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_statement_defines_does_not_lead_us_elsewhere(asked: Store, tmp_path: Path) -> None:
    [(norm,)] = asked.query("SELECT grad_norm('p-01')")[1]
    lies = "; ".join(
        f"CREATE TEMP TABLE {table} AS SELECT * REPLACE ({lie}) FROM {table}"
        for table, lie in {
            "segments": f"'{tmp_path}' AS path",
            "exposures": "99 AS row_start",
            "runs": "'other' AS name",
        }.items()
    )
    assert asked.query(f"{lies}; SELECT grad_norm('p-01'), min(path) FROM segments")[1] == [
        (norm, str(tmp_path))
    ]
    assert asked.rows("SELECT min(name) FROM runs") == [("run-1",)]
    assert asked.query("SELECT name FROM runs")[1] == [("run-1",)]


def test_two_stores_of_one_process_ask_at_once(trained: Tiny) -> None:
    one, other = Store.open(trained.store), Store.open(trained.store)
    with catalog.reader(one.root) as a, catalog.reader(other.root) as b:
        query = "SELECT grad_norm('p-01')"
        with module.functions(a, one, query), module.functions(b, other, query):
            assert a.execute(query).fetchall() == b.execute(query).fetchall()


def test_a_damaged_record_is_told_as_such(copied: Tiny) -> None:
    for shard in copied.store.glob("segments/*/*/D/c.0.0"):
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(StoreDamaged, match="checksum"):
        Store.open(copied.store).query("SELECT sum(grad_norm(id)) FROM samples")


def test_on_the_command_line(trained: Tiny) -> None:
    [row] = run_json("sql", "SELECT grad_norm('p-01') AS n", "-s", trained.store)
    assert row["n"] == pytest.approx(gradients(Store.open(trained.store))["p-01"].norm())
    said = refused("sql", "SELECT grad_norm('p-99')", "-s", trained.store)
    assert said.startswith("no sample has the id 'p-99'")


def test_schema_lists_them_with_what_they_return(trained: Tiny) -> None:
    printed = run("schema", "-s", trained.store).stdout
    assert "epoch := the first stored" in printed
    calls = {
        "grad_norm": "grad_norm('p-01') AS grad_norm",
        "grad_dot": "grad_dot('p-01', 'p-02') AS grad_dot",
        "grad_cosine": "grad_cosine('p-01', 'p-02') AS grad_cosine",
        "neighbours": "* FROM neighbours('p-01')",
        "token_norms": "* FROM token_norms('p-01')",
        "influence": "* FROM influence('p-01')",
    }
    assert calls.keys() == {function.name for function in module.FUNCTIONS}
    for name, call in calls.items():
        columns = run_json("schema", name, "-s", trained.store)
        query = f"SELECT column_name, column_type FROM (DESCRIBE SELECT {call})"
        _, described = Store.open(trained.store).query(query)
        assert [(column["column"], column["type"]) for column in columns] == described
