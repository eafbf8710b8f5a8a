"""Pages say what the catalog does, load nothing, and name nobody when redacted."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from test_startup import HEAVY, PROGRAM
from tiny import FAR, Tiny, records, refused, run

from gradstore import Store
from gradstore.report import clock, page, request
from gradstore.report.text import decode, texts_of
from gradstore.training.model import train_tokenizer

pytest_plugins = ["tiny"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib")
VOID = {"meta", "br", "link", "img", "hr", "input"}
LOADING = {"src", "srcset", "poster", "data", "action", "background", "formaction", "ping"}


@pytest.fixture(scope="module")
def asked(trained: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A store with three requests, of which the first was evaluated against a retrained model:
    forgotten two records, the same exactly, and one that was refused.
    """
    folder = tmp_path_factory.mktemp("asked")
    tiny = replace(trained, store=shutil.copytree(trained.store, folder / "store"))
    base = ("-s", tiny.store, "--model", tiny.model, "--out")
    run("forget", "p-07", "p-02", *base, folder / "out-1", *FAR, code=None)
    run("forget", "p-07", "p-02", *base, folder / "out-2", "--exact")
    run("forget", "p-03", *base, folder / "out-3", "--dose", "target:0.001", code=3)
    run(
        "eval", 1, "-s", tiny.store, "--model", folder / "out-1", "--original", tiny.model,
        "--reference", folder / "out-2", "--attack", "relearn", "--relearn-steps", 2, code=None,
    )  # fmt: skip
    return tiny


@pytest.fixture
def store(asked: Tiny) -> Iterator[Store]:
    with Store.open(asked.store) as opened:
        yield opened


@pytest.fixture
def changed(asked: Tiny, tmp_path: Path) -> Store:
    """The same in a copy, which a test may change."""
    return Store.open(shutil.copytree(asked.store, tmp_path / "store"))


class Page(HTMLParser):
    """A page's elements; an element that is not closed, or twice an id, is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.heats: list[list[tuple[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "p" and self.inside("div", "heat", "heat blocks"):
            self.heats.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.inside("style") or self.inside("svg"):
            return
        self.text += data
        if self.inside("td") or self.inside("th"):
            self.tables[-1][-1][-1] += data.strip()
        if (
            self.open[-1:]
            and self.open[-1][0] == "span"
            and self.inside("div", "heat", "heat blocks")
        ):
            self.heats[-1].append((data, self.open[-1][1].get("title")))

    def inside(self, tag: str, *kinds: str) -> bool:
        return any(t == tag and (not kinds or a.get("class") in kinds) for t, a in self.open)

    def table(self, heading: str) -> list[list[str]]:
        """The rows of the table whose first heading it is."""
        [found] = [table[1:] for table in self.tables if table[0][0] == heading]
        return found


def texts_in(data: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in data.read_text().splitlines()]


def value(said: str) -> float:
    return float(said.replace("−", "-"))


@pytest.fixture(scope="module")
def plain(asked: Tiny) -> dict[str, str]:
    return pages(asked)


@pytest.fixture(scope="module")
def redacted(asked: Tiny) -> dict[str, str]:
    return pages(asked, redacted=True)


def pages(asked: Tiny, *, redacted: bool = False) -> dict[str, str]:
    store = Store.open(asked.store)
    found = {str(n): page.request_page(store, n, redacted=redacted) for n in (1, 2, 3)}
    found["run"] = page.run_page(store, "run-1", redacted=redacted)
    found["index"] = page.index_page(store, date(2031, 5, 6), redacted=redacted)
    return found


# -- what it is made of --------------------------------------------------------------------------


def test_pages_are_whole_and_load_nothing(plain: dict[str, str], redacted: dict[str, str]) -> None:
    for html in [*plain.values(), *redacted.values()]:
        parsed = Page(html)
        assert html.startswith("<!DOCTYPE html>")
        assert ("html", {"lang": "en"}) in parsed.elements
        assert not {tag for tag, _ in parsed.elements} & {"script", "link", "img", "iframe", "base"}
        for _, attributes in parsed.elements:
            assert not attributes.keys() & LOADING
            assert not any(name.startswith("on") for name in attributes)
            assert (attributes.get("href") or "#").startswith("#")
        assert set(re.findall(r"url\((.)", html)) <= {"#"}
        assert not re.findall(r"https?://|@import", html)
        assert "default-src 'none'" in html
        ids = Counter(a["id"] for _, a in parsed.elements if "id" in a)
        assert set(ids.values()) <= {1}
        referred = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', html)
        assert {one or other for one, other in referred} == ids.keys()


def test_pages_can_be_read_aloud(plain: dict[str, str]) -> None:
    for html in plain.values():
        parsed = Page(html)
        levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch(r"h\d", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b <= a + 1 for a, b in pairwise(levels))
        assert all("scope" in a for tag, a in parsed.elements if tag == "th")
        charts = re.findall(r"<svg [^>]*>", html)
        assert all('role="img"' in chart for chart in charts)
        assert len(re.findall(r"<svg [^>]*><title>\w", html)) == len(charts)
        assert re.search(r"#0[1-4]0", html) is None  # every colour is the style sheet's


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colours_have_contrast_in_light_and_dark() -> None:
    """WCAG 2.2, 1.4.3: text at 4.5 to 1."""
    css = (Path(page.__file__).parent / "page.css").read_text("utf-8")
    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in css.split("@media")[:2]]
    assert [len(scheme) for scheme in schemes] == [12, 12]
    for scheme in schemes:
        pairs = [(name, "paper") for name in ("ink", "soft", "accent")]
        pairs += [("ink", "r1"), ("ink", "r2"), ("ink", "r3"), ("on-dark", "r4"), ("on-dark", "r5")]
        for one, other in pairs:
            low, high = sorted(luminance(scheme[name]) for name in (one, other))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (one, other)


def test_the_same_store_makes_the_same_bytes(asked: Tiny, plain: dict[str, str]) -> None:
    assert pages(asked) == plain


# -- what it says --------------------------------------------------------------------------------


def test_a_page_says_what_the_catalog_does(store: Store, plain: dict[str, str]) -> None:
    parsed = Page(plain["1"])
    [facts] = store.table("SELECT * FROM requests WHERE request_id = 1")
    for digest in ("model_in_digest", "model_out_digest"):
        assert facts[digest] in parsed.text
    assert facts["reason"] in parsed.text
    assert store.rows("SELECT digest FROM receipts WHERE request_id = 1")[0][0] in parsed.text
    assert "The file in the store has this digest." in parsed.text

    names = {"forget": "forgotten", "retained": "retained", "holdout": "held-out"}
    losses = {
        (names[role], metric): values
        for role, metric, *values in store.rows(
            """SELECT role, metric, samples, before, after, change, worst_change FROM collateral
               WHERE request_id = 1"""
        )
    }
    shown = {(r[0], r[1]): [value(cell) for cell in r[2:]] for r in parsed.table("records")}
    assert shown.keys() == losses.keys()
    for key, values in losses.items():
        assert shown[key] == pytest.approx(values, abs=6e-5)

    ledger = store.rows(
        """SELECT id, role, loss_before, loss_after, rise, forecast_rise FROM ledger
           WHERE request_id = 1 ORDER BY rise DESC, role, id LIMIT 20"""
    )
    for row, (name, role, *values) in zip(parsed.table("record"), ledger, strict=True):
        assert row[:2] == [name, names[role]]
        assert [value(cell) for cell in row[2:]] == pytest.approx(values, abs=6e-5)

    path = store.rows(
        """SELECT dose, forget_loss, forecast_loss, retained_loss, holdout_loss, chosen FROM paths
           WHERE request_id = 1 ORDER BY dose"""
    )
    for row, (*numbers, chosen) in zip(parsed.table("dose"), path, strict=True):
        assert [value(cell) for cell in row[:-1]] == pytest.approx(numbers, rel=1e-4, abs=6e-5)
        assert (row[-1] == "chosen") == chosen


def test_the_heat_map_is_that_of_the_catalog(
    store: Store, asked: Tiny, plain: dict[str, str]
) -> None:
    texts = {row["id"]: row["text"] for row in texts_in(asked.data)}
    rows = store.rows(
        """SELECT id, list([before, after, first_met] ORDER BY position) FROM token_losses
           JOIN samples USING (sample_id) WHERE request_id = 1 GROUP BY id, sample_id
           ORDER BY sample_id"""
    )
    heats = Page(plain["1"]).heats
    assert len(heats) == 2 * len(rows) == 4
    for at, (name, losses) in enumerate(rows):
        taken, gave = heats[2 * at], heats[2 * at + 1]
        for heat in (taken, gave):
            assert "".join(text for text, _ in heat).startswith(texts[name])
            assert heat[0][1] is None  # nothing predicts the first
        assert [title for _, title in gave[1:]] == [f"{b:.2f} → {a:.2f}" for b, a, _ in losses]
        assert [title for _, title in taken[1:]] == [
            f"{b:.2f} → first met {f:.2f}" for b, _, f in losses
        ]


@pytest.mark.parametrize(
    ("rise", "shade"),
    [
        (None, ""), (float("nan"), ""), (0.0, ""), (0.09, ""), (0.1, "r1"), (0.5, "r2"),
        (2.9, "r3"), (3.0, "r4"), (99.0, "r5"), (-0.09, ""), (-0.1, "f"),
    ],
)  # fmt: skip
def test_shades_are_those_of_the_legend(rise: float | None, shade: str) -> None:
    assert page._heat(rise) == shade


def test_evaluations_and_their_reference_are_shown(store: Store, plain: dict[str, str]) -> None:
    html = plain["1"]
    parsed = Page(html)
    [(passed, settings)] = store.rows("SELECT passed, settings FROM evaluations")
    for check in json.loads(settings)["checks"]:
        assert check["found"] in parsed.text
    results = {row[0]: row[1] for row in parsed.table("check")}
    assert results == {
        check["check"]: {True: "passed", False: "failed", None: "not tried"}[check["passed"]]
        for check in json.loads(settings)["checks"]
    }
    failed = [name for name, result in results.items() if result == "failed"]
    assert passed is not bool(failed)
    verdict, _ = " ".join(parsed.text.split()).split("What was asked Records")
    assert "Compared with a model that never saw them" in verdict
    if failed:
        assert f"{', '.join(failed)} failed" in verdict
    else:
        assert "it passed every check" in verdict
    [(reference,)] = store.rows(
        "SELECT avg(reference) FROM evidence WHERE role = 'forget' AND metric = 'loss'"
    )
    assert f"never saw the records: {reference:.3f}" in " ".join(parsed.text.split())
    assert "Loss while the forgotten is taught again" in html
    assert [row[0] for row in parsed.table("step")] == ["0", "1", "2"]
    assert store.rows("SELECT reference_digest FROM evaluations")[0][0] in parsed.text
    loss = [row for row in parsed.table("measure") if row[0].startswith("lossmean")]
    assert loss[0][1] == "forgotten"
    assert value(loss[0][-1]) == pytest.approx(reference, rel=1e-4)
    assert "None was made." in Page(plain["3"]).text


def test_an_evaluation_of_another_checkpoint_is_told_apart(changed: Store) -> None:
    with changed.transaction() as connection:
        connection.execute("UPDATE evaluations SET model_digest = 'another', passed = true")
    text = " ".join(Page(page.request_page(changed, 1)).text.split())
    assert "It is of another checkpoint than the one this request wrote." in text
    verdict, _ = text.split("What was asked Records")
    assert "Compared with" not in verdict


def test_requests_of_other_kinds_have_pages(plain: dict[str, str]) -> None:
    exact = Page(plain["2"])
    assert "train again from the start" in exact.text
    assert "This request has no receipt" in exact.text
    assert not [table for table in exact.tables if table[0][0] == "dose"]
    none = Page(plain["3"])
    assert "No checkpoint was written" in none.text
    assert none.text.count("Nothing: no checkpoint was written.") == 1


def test_the_page_of_a_run(store: Store, plain: dict[str, str]) -> None:
    parsed = Page(plain["run"])
    epochs = dict(store.rows("SELECT epoch, avg(loss) FROM exposures GROUP BY epoch"))
    held_out = dict(store.rows("SELECT epoch, avg(loss) FROM holdout_losses GROUP BY epoch"))
    table = parsed.table("epoch")
    assert [int(row[0]) for row in table] == sorted(held_out) == [0, 1, 2]
    for epoch, _, members, holdout in table:
        assert value(holdout) == pytest.approx(held_out[int(epoch)], abs=6e-5)
        if members != "–":
            assert value(members) == pytest.approx(epochs[int(epoch)], abs=6e-5)
    assert [row[0] for row in parsed.table("request")] == ["1", "2", "3"]
    kinds = {kind for (kind,) in store.rows("SELECT kind FROM segments")}
    assert {row[0] for row in parsed.table("kind")} == kinds
    [(median,)] = store.rows("SELECT median(relative_error) FROM exposures")
    assert f"median {median:.5g}" in parsed.text
    assert store.run()["checkpoint_digest"] in parsed.text


# -- the clock -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("received", "due"),
    [
        ("2027-01-15", "2027-02-15"), ("2027-01-31", "2027-02-28"), ("2028-01-30", "2028-02-29"),
        ("2027-12-31", "2028-01-31"), ("2027-03-31", "2027-04-30"), ("2027-02-28", "2027-03-28"),
    ],
)  # fmt: skip
def test_a_month_ends_on_the_same_day_or_the_last(received: str, due: str) -> None:
    assert clock.one_month_after(date.fromisoformat(received)) == date.fromisoformat(due)


def test_the_index_tells_what_is_due(changed: Store) -> None:
    """Records of request 1 are asked for again later; request 3 was refused and stays open."""
    with changed.transaction() as connection:
        for number, made, verdict in (
            (1, "2027-01-31 10:00", "partly"),
            (2, "2027-03-02 23:59:50", "forgotten"),
            (3, "2027-02-10 08:00", "refused"),
        ):
            connection.execute(
                """UPDATE requests SET created_at = ?, verdict = ?, seconds = 60
                   WHERE request_id = ?""",
                [made, verdict, number],
            )
    day = date(2027, 3, 11)
    table = Page(page.index_page(changed, day)).table("request")
    assert [row[0] for row in table] == ["3", "2", "1"]
    clocks = {row[0]: row[2:6] for row in table}
    late = ["2027-01-31", "2027-02-28", "2027-03-03", "done 3 days late"]
    assert clocks == {
        "1": late,
        "2": late,
        "3": ["2027-02-10", "2027-03-10", "–", "overdue by 1 day"],
    }
    assert Page(page.index_page(changed, date(2027, 3, 10))).table("request")[0][5] == (
        "open, 0 days left"
    )
    assert "3 requests, 1 open, 1 overdue." in Page(page.index_page(changed, day)).text
    with changed.transaction() as connection:
        connection.execute(
            """UPDATE requests SET verdict = if(request_id = 1, 'forgotten', 'partly')
               WHERE request_id < 3"""
        )
    clocks = {row[0]: row[2:6] for row in Page(page.index_page(changed, day)).table("request")}
    assert clocks["1"] == clocks["2"] == ["2027-01-31", "2027-02-28", "2027-01-31", "done"]


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
    store: Store, asked: Tiny, plain: dict[str, str], redacted: dict[str, str]
) -> None:
    ids = [name for (name,) in store.rows("SELECT id FROM samples")]
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
    hashes = [r.name for r in request.gather(store, 1, lambda: texts_of(store, 1, None)).records]
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


def test_ten_long_records_are_below_400_kb(store: Store) -> None:
    facts = request.gather(store, 1, lambda: texts_of(store, 1, None))
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


# -- how it looks --------------------------------------------------------------------------------

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to draw the page")
def test_it_is_light_or_dark_as_the_reader_prefers(plain: dict[str, str], tmp_path: Path) -> None:
    file, shot = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(plain["run"])
    for dark, paper, accent in ((0, "#ffffff", "#0b6b6b"), (1, "#14181b", "#5cc4be")):
        options = [
            "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--window-size=900,1000", f"--blink-settings=preferredColorScheme={1 - dark}",
            f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}",
        ]  # fmt: skip
        command = [str(CHROMIUM), *options, file.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        drawn = (imread(shot)[..., :3] * 255).round().astype(int)
        assert "#{:02x}{:02x}{:02x}".format(*drawn[2, 2]) == paper
        lit = (drawn == [int(accent[at : at + 2], 16) for at in (1, 3, 5)]).all(-1)
        assert lit[400:].any()  # the chart's line, below the verdict
