"""``gradstore report``: what its pages must not say, their files, their errors, their tokens."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_pages import Page, texts_in
from test_startup import HEAVY, PROGRAM
from tiny import Tiny, records, refused, run

from gradstore import Store
from gradstore.report import page, request
from gradstore.report.text import decode, texts_of
from gradstore.training.model import train_tokenizer

pytest_plugins = ["tiny", "report_pages"]


# -- what it must not say ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", '"><img src=x>', "a&lt;b", "]]>{{ 7*7 }}"]
)
def test_names_are_text(name: str, changed: Store) -> None:
    with changed.transaction() as connection:
        connection.execute("UPDATE samples SET id = id || ? WHERE id IN ('p-07', 'p-04')", [name])
        connection.execute("UPDATE runs SET name = ?", [name])
        connection.execute(
            "UPDATE requests SET reason = ?, settings = json_object('notes', [?], 'seed', 0)",
            [name, name],
        )
    found = request.gather(changed, 1, lambda: lambda ids: [name] * len(ids))
    for html in (
        page.render_request(found),
        page.run_page(changed, "1"),
        page.index_page(changed, date(2031, 1, 1)),
    ):
        parsed = Page(html)
        assert name in parsed.text
        assert not {tag for tag, _ in parsed.elements} & {"script", "img"}


def test_redacted_pages_name_nobody(
    opened: Store, asked: Tiny, plain: dict[str, str], redacted: dict[str, str]
) -> None:
    ids = [name for (name,) in opened.rows("SELECT id FROM samples")]
    rows = texts_in(asked.data) + texts_in(asked.holdout)
    words = {word for row in rows for word in re.findall(r"[^\W\d_]{6,}", row["text"])}
    paths = [str(asked.store), str(asked.model), str(asked.store.parent), str(asked.data.parent)]
    assert "painter" in words
    for name, html in redacted.items():
        said = html.encode()
        for secret in [*ids, *words, *paths, "/out-1", "out-2"]:
            assert secret.encode() not in said, (name, secret)
        for heat in Page(html).heats:
            assert {len(text) for text, _ in heat} <= {2, 4, 7}
            assert {text.replace("\u2007", "") for text, _ in heat} <= {""}
    for secret in ("p-07", "p-02", str(asked.model), "phone"):
        assert secret in plain["1"]
    hashes = [r.name for r in request.gather(opened, 1, lambda: texts_of(opened, 1, None)).records]
    assert hashes == ["p-02", "p-07"]
    receipt = json.loads(run("receipt", "show", 1, "-s", asked.store).stdout)
    assert all(f'title="{one}"' in redacted["1"] for one in receipt["ids"])


def test_what_users_wrote_is_not_in_redacted_pages(changed: Store) -> None:
    """A model that is no folder, whose name stands for its digest; notes; names of folders."""
    with changed.transaction() as connection:
        connection.execute(
            """UPDATE requests SET model_in = 'someone/secret', model_in_digest = 'someone/secret',
                   settings = '{"notes": ["p-03 again"], "from_checkpoints": ["mine"], "seed": 7}'
            """
        )
        connection.execute('UPDATE runs SET settings = \'{"start": {"model": "someone/secret"}}\'')
    plain = page.request_page(changed, 1) + page.run_page(changed, "1")
    redacted = page.request_page(changed, 1, redacted=True)
    assert "<dt>seed</dt><dd>7</dd>" in redacted
    redacted += page.run_page(changed, "1", redacted=True)
    for secret in ("someone/secret", "p-03 again", "<dd>mine"):
        assert secret in plain
        assert secret not in redacted


# -- sizes, files and errors ---------------------------------------------------------------------


def test_ten_long_records_are_below_400_kb(opened: Store) -> None:
    facts = request.gather(opened, 1, lambda: texts_of(opened, 1, None))
    token = request.Token(" ordinary", 0.123, 4.567, 6.789)
    each = replace(facts.records[0], shown=(token,) * (request.TOKENS // 10), predicted=1000)
    stay = request.Stay("some-identifier", "retained", 1.234, 2.345, 1.5)
    html = page.render_request(replace(facts, records=(each,) * 10, stays=(stay,) * 200))
    assert "the first 160 of 1000 tokens are shown" in html
    assert len(html.encode()) <= 400_000


def test_a_store_from_before_there_was_evidence(changed: Store) -> None:
    with changed.transaction() as connection:
        for table in ("receipts", "evaluations", "measurements", "token_losses"):
            connection.execute(f"DROP TABLE {table} CASCADE")
        for table, column in (("scores", "forecast"), ("paths", "forecast_loss")):
            connection.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
    parsed = Page(page.request_page(changed, 1))
    assert "no losses of tokens" in parsed.text
    assert "no receipt" in parsed.text


def test_a_receipt_that_was_changed_is_told(changed: Store) -> None:
    for text in ("", '{"format": 1}'):
        (changed.root / "receipts" / "0001.json").write_text(text)
        assert "does not have this digest" in page.request_page(changed, 1)


def test_figures_that_are_none_do_not_stop_it(changed: Store) -> None:
    with changed.transaction() as connection:
        connection.execute("UPDATE scores SET after = 'inf' WHERE request_id = 1")
        connection.execute(
            "UPDATE paths SET forget_loss = 'nan', holdout_loss = 'inf' WHERE chosen"
        )
        connection.execute("UPDATE requests SET target = 'nan'")
    assert "∞" in Page(page.request_page(changed, 1)).text


def test_files_are_not_overwritten(asked: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    base = ("-s", asked.store, "--out", out)
    said = run("report", 1, *base, "--model", asked.model).stderr
    assert said == f"wrote {out}\n"
    first = out.read_bytes()
    assert "add --force" in refused("report", "--index", *base)
    assert out.read_bytes() == first
    run("report", "--index", *base, "--force")
    assert b"Forget requests" in out.read_bytes()
    run("report", "--run", "run-1", *base, "--force", "--redact")
    assert sorted(tmp_path.iterdir()) == [out]


def test_what_is_refused(asked: Tiny, tmp_path: Path) -> None:
    base = ("-s", asked.store, "--out", tmp_path / "page.html")
    for wrong in ((), (1, "--index"), (1, "--run", "run-1"), ("--index", "--model", asked.model)):
        run("report", *wrong, *base, code=2)
    assert "no forget request 9; it has: 1, 2, 3" in refused("report", 9, *base)
    assert "no run 'x'" in refused("report", "--run", "x", *base)
    assert "cannot write" in refused(
        "report", "--index", "-s", asked.store, "--out", tmp_path / "gone" / "page.html"
    )
    other = tmp_path / "other"
    train_tokenizer(["another text"], 300).save_pretrained(other)
    assert "is not the one" in refused("report", 1, *base, "--model", other)
    assert "holds no tokenizer" in refused("report", 1, *base, "--model", tmp_path)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(("library", "what"), [("matplotlib", 1), ("jinja2", "--index")])
def test_without_the_extra_the_command_to_install_it_is_told(
    library: str, what: Any, asked: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, "gradstore.report.plots", raising=False)
    monkeypatch.delattr("gradstore.report.plots", raising=False)
    said = refused("report", what, "-s", asked.store, "--out", tmp_path / "page.html")
    assert said.endswith("run `pip install 'gradstore[report]'`")


def test_the_index_needs_no_torch(asked: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "index.html"
    arguments = ["report", "--index", "-s", str(asked.store), "--out", str(out)]
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {name.split(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}
    assert not found & HEAVY
    assert out.exists()


# -- what tokens say -----------------------------------------------------------------------------

TOKENIZER = train_tokenizer([row["text"] for row in records(8, "p", 1)], 300)


@settings(max_examples=50)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=30))
def test_tokens_say_the_text_together(text: str) -> None:
    ids = TOKENIZER.encode(text)
    said = decode(TOKENIZER, ids)
    assert len(said) == len(ids)
    assert "".join(said) == TOKENIZER.decode(ids)


def test_without_a_tokenizer_tokens_are_numbers(changed: Store, tmp_path: Path) -> None:
    with changed.transaction() as connection:
        connection.execute("UPDATE requests SET model_in = '/gone', model_out = NULL")
    found = request.gather(changed, 1, lambda: texts_of(changed, 1, None))
    tokens = changed.tokens([changed.resolve(["p-02"])["p-02"]], 1)
    [expected] = tokens.values()
    record = found.records[0]
    assert [record.opening, *(t.text for t in record.shown)] == [f"#{t}" for t in expected.tolist()]


def test_sentence_pieces_keep_their_space() -> None:
    class Pieces:
        def decode(self, ids: list[int], **_: object) -> str:
            return "".join(["Hello", "world"][i] for i in ids)

        def convert_ids_to_tokens(self, token: int) -> str:
            return ["▁Hello", "▁world"][token]

    assert decode(Pieces(), [0, 1]) == [" Hello", " world"]
