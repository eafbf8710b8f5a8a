"""What a store makes is its owner's alone, and ids are data in every command."""

import csv
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from tiny import FAR, Tiny, counts, files, records, refused, run, run_json, write_jsonl

from gradstore import Store

pytest_plugins = ["tiny"]
NASTY = [
    "'; DROP TABLE samples; --",
    "../../x",
    "/etc/passwd",
    "%s %n {0} {id}",
    "🦆 naïve e\u0301 ﷺ",
    "long" * 2500,
    "two\nlines\r\n\tand a tab",
    "null\x00byte",
    "\x1b]0;title\x07\x1b[31mred\x9b2J",
    "[red]:star:[/red]\\",
    "<script>alert(1)</script>",
    '"a",b;=1+1',
]
ALLOWED = "\n"  # of control characters, in a table


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A store of such ids after ingest, forget and sketch, by a user who shares all they make."""
    folder = tmp_path_factory.mktemp("nasty")
    tiny = files(folder)
    texts = [record["text"] for record in records(len(NASTY), "n", 5)]
    rows = [{"id": id, "text": text} for id, text in zip(NASTY, texts, strict=True)]
    tiny = replace(tiny, data=write_jsonl(folder / "nasty.jsonl", rows))
    with umask(0):
        run("init", tiny.store)
        run(
            "ingest", tiny.data, "-s", tiny.store, "--config", tiny.config, "--vocabulary", 400,
            "--epochs-captured", "all", "--epochs", 2, "--batch-size", 4, "--lr", 0.02,
            "--holdout", tiny.holdout, "--out", tiny.model,
        )  # fmt: skip
        run("forget", NASTY[0], "-s", tiny.store, "--model", tiny.model, "--out", folder / "out",
            *FAR, code=None)  # fmt: skip
        run("sketch", "-s", tiny.store)
    return tiny


def test_the_store_is_its_owners_alone(nasty: Tiny) -> None:
    paths = [nasty.store, *nasty.store.rglob("*")]
    made = {path.relative_to(nasty.store).parts[0] for path in paths[1:]}
    assert {"catalog.duckdb", "catalog.lock", "gradstore.json", "published", "receipts"} <= made
    assert any(path.name == "manifest.json" for path in paths)
    modes = {str(path): path.stat().st_mode & 0o777 for path in paths}
    assert [p for p in paths if modes[str(p)] != (0o700 if p.is_dir() else 0o600)] == []


def test_files_that_a_user_names_are_as_their_umask_says(nasty: Tiny, tmp_path: Path) -> None:
    with umask(0o022):
        run("report", 1, "-s", nasty.store, "--out", tmp_path / "page.html")
        run("export", "--tables", tmp_path / "tables", "-s", nasty.store)
    for path in (tmp_path / "page.html", tmp_path / "tables" / "samples.parquet"):
        assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("id", NASTY, ids=lambda id: id[:12].encode("unicode_escape").decode())
def test_ids_are_data_in_every_command(id: str, nasty: Tiny, tmp_path: Path) -> None:
    before, outside = counts(nasty.store), sorted(nasty.store.parent.rglob("*"))
    if "\x00" not in id:  # no program is given one as an argument
        [of] = run_json("list", id, "-s", nasty.store)
        assert (of["id"], of["gradients"]) == (id, 2)
        assert run_json("show", id, "-s", nasty.store)["sample"][0]["id"] == id
        shown = run("show", id, "-s", nasty.store).stdout
        assert not [c for c in shown if not c.isprintable() and c not in ALLOWED]
        arguments = ["-s", nasty.store, "--model", nasty.model]
        run("forget", id, *arguments, "--out", tmp_path / "out", "--dry-run", *FAR, code=None)
        run("match", id, "-s", nasty.store, "--dry-run")
        one = tmp_path / "one.npz"
        run("export", "--gradients", id, one, "-s", nasty.store, "--epoch", 1)
        assert one.exists()
        said = refused("show", f"{id}?", "-s", nasty.store)
        assert said.isprintable()
        assert not (tmp_path / "out").exists()
    quoted = "||chr(0)||".join(f"'{part}'" for part in id.replace("'", "''").split("\x00"))
    asked = f"SELECT id, grad_norm(id) > 0 AS positive FROM samples WHERE id = {quoted}"
    assert Store.open(nasty.store).query(asked) == (["id", "positive"], [(id, True)])
    assert counts(nasty.store) == before
    assert sorted(nasty.store.parent.rglob("*")) == outside


def test_ids_are_shown_and_not_obeyed(nasty: Tiny) -> None:
    query = "SELECT id FROM samples WHERE split = 'train' ORDER BY sample_id"
    table = run("sql", query, "-s", nasty.store).stdout
    assert not [c for c in table if not c.isprintable() and c not in ALLOWED]
    assert "\\x1b]0;title\\x07\\x1b[31mred\\x9b2J" in table
    assert "[red]:star:[/red]\\" in table
    as_csv = list(csv.DictReader(StringIO(run("sql", query, "--csv", "-s", nasty.store).stdout)))
    assert sorted(row["id"].split() for row in as_csv) == sorted(id.split() for id in NASTY)
    assert sorted(row["id"] for row in run_json("sql", query, "-s", nasty.store)) == sorted(NASTY)
    named = 'SELECT 1 AS "[red]:star:"'
    assert "[red]:star:" in run("sql", named, "-s", nasty.store).stdout


def test_a_page_shows_ids_as_text(nasty: Tiny, tmp_path: Path) -> None:
    run("report", 1, "-s", nasty.store, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    assert "DROP TABLE" in page


def test_an_id_that_is_no_text_is_refused(nasty: Tiny, tmp_path: Path) -> None:
    data = tmp_path / "half.jsonl"
    data.write_text(json.dumps({"id": "\ud800", "text": "Ada is a baker."}) + "\n")
    store = shutil.copytree(nasty.store, tmp_path / "store")
    before = counts(store)
    said = refused("ingest", data, "-s", store, "--model", nasty.model, "--out", tmp_path / "out")
    assert "line 1: id or text holds half of a surrogate pair" in said
    assert counts(store) == before
