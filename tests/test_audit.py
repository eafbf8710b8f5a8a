"""The audit chain holds an entry for what was done, and whatever is changed in it is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import pytest
from records import RUN
from tiny import Tiny, refused, run, run_json

from gradstore import Store
from gradstore.errors import IdError
from gradstore.store import audit, catalog
from gradstore.unlearn import receipt as receipts

pytest_plugins = ["tiny", "receipted"]

Rows = list[dict[str, Any]]


@pytest.fixture
def chain(store: Store) -> Rows:
    """Three entries, the last two in one transaction."""
    with store.transaction() as connection:
        audit.append(connection, "repair", "request:1", {"files": 2, "why": "café"})
    with store.transaction() as connection:
        audit.append(connection, "erase", "ab12 cd34", {"samples": 2})
        audit.append(connection, "search", "ab12 cd34", {"hits": 0})
    return store.table(audit.SELECT)


def test_an_entry_is_the_digest_of_its_canonical_json_and_names_the_one_before(chain: Rows) -> None:
    assert [row["number"] for row in chain] == [1, 2, 3]
    assert audit.check(chain) == []
    previous = None
    for row in chain:
        assert row["previous"] == previous
        entry = {
            "number": row["number"],
            "created_at": row["created_at"].isoformat(),
            "kind": row["kind"],
            "subject": row["subject"],
            "details": json.loads(row["details"]),
            "previous": previous,
        }
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        previous = row["digest"]
        assert previous == sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda rows: rows[0].update(kind="erase"), "entry 1 is not what its digest says"),
        (lambda rows: rows[1].update(subject="ab12"), "entry 2 is not what its digest says"),
        (lambda rows: rows[1].update(details='{"samples":3}'), "entry 2 is not what its digest"),
        (lambda rows: rows[1].update(details="{"), "entry 2 is no entry"),
        (lambda rows: rows[2].update(previous=None), "entry 3 does not follow"),
        (lambda rows: rows.pop(1), "where entry 2 should be, there is entry 3"),
        (lambda rows: rows.pop(0), "entry 2 does not follow"),
        (lambda rows: rows.reverse(), "entry 3 does not follow"),
    ],
)
def test_whatever_is_changed_is_found(
    change: Callable[[Rows], Any], finding: str, chain: Rows
) -> None:
    change(chain)
    assert any(finding in found for found in audit.check(chain))


def test_a_pinned_head_shows_what_is_missing_at_the_end(chain: Rows) -> None:
    heads = [row["digest"] for row in chain]
    assert [audit.check(chain, head) for head in heads] == [[], [], []]
    assert audit.check(chain[:2]) == []  # by itself, it does not show
    [finding] = audit.check(chain[:2], heads[2])
    assert heads[2] in finding
    assert len(audit.check([], heads[0])) == 1


def test_what_is_not_committed_leaves_no_entry(store: Store, chain: Rows) -> None:
    def fail() -> None:
        with store.transaction() as connection:
            audit.append(connection, "repair", "", {})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert store.table(audit.SELECT) == chain


def test_requests_and_receipts_have_entries_without_ids(three: Tiny) -> None:
    store = Store.open(three.store)
    rows = store.table(audit.SELECT)
    assert [row["kind"] for row in rows] == ["forget", "receipt"] * 3
    named = [receipts.hash_id(store, id) for id in ("p-02", "p-07")]
    assert rows[0]["subject"] == " ".join(sorted(named))
    assert json.loads(rows[0]["details"])["request"] == 1
    for number in (1, 2, 3):
        entry, receipt = rows[2 * number - 1], receipts.read(store, number)
        assert entry["subject"] == f"request:{number}"
        assert json.loads(entry["details"]) == {
            "digest": receipts.digest_of(receipt),
            "update": receipt["update"],
        }
    assert "p-0" not in json.dumps(rows, default=str)


def test_a_request_about_what_was_erased_meanwhile_is_not_entered(store: Store) -> None:
    store.begin_run(RUN)
    request = {
        "request_id": 1, "run_id": 1, "created_at": catalog.now(), "direction": "raw",
        "dose_asked": "1", "verdict": "partly", "reason": "", "model_in": "", "model_in_digest": "",
        "seconds": 1.0,
    }  # fmt: skip
    score = {"request_id": 1, "sample_id": 24, "role": "forget", "metric": "loss", "before": 1.0}

    def enter() -> None:
        with store.transaction() as connection:
            for table, row in (("requests", request), ("scores", score)):
                catalog.insert(connection, table, {name: [value] for name, value in row.items()})
            receipts.enter(store, connection, 1)

    with pytest.raises(IdError, match="erased meanwhile"):
        enter()
    assert store.rows("SELECT * FROM requests") == []


def test_the_command_lists_and_checks(store: Store, chain: Rows) -> None:
    shown = run("audit", "-s", store.root)
    assert shown.stderr == f"the chain of 3 holds; head {chain[-1]['digest']}\n"
    listed = run_json("audit", "-s", store.root, "--head", chain[0]["digest"])
    assert [entry["digest"] for entry in listed] == [row["digest"] for row in chain]
    broken = run("audit", "-s", store.root, "--head", "0" * 64, code=3)
    assert "no entry has the digest 0000" in broken.stderr
    with store.transaction() as connection:
        connection.execute("UPDATE audit SET kind = 'override' WHERE number = 2")
    broken = run("audit", "-s", store.root, "--csv", code=3)
    assert "entry 2 is not what its digest says\nthe audit chain is broken\n" in broken.stderr
    assert broken.stdout.count("\n") == 4


def test_a_store_in_which_nothing_was_done(store: Store) -> None:
    assert "holds nothing yet" in refused("audit", "-s", store.root)
    store.begin_run(RUN)
    assert run("audit", "-s", store.root, "--json").stdout == "[]\n"
