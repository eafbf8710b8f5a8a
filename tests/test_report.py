"""Pages say what the catalog does, are valid and load nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.image import imread
from report_pages import Page, pages, texts_in, value
from tiny import Tiny

from gradstore import Store
from gradstore.evaluate import audience, neighbours
from gradstore.report import clock, page
from gradstore.unlearn.forget import ForgetSettings, forget

pytest_plugins = ["tiny", "report_pages"]
LOADING = {"src", "srcset", "poster", "data", "action", "background", "formaction", "ping"}


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


def test_a_page_says_what_the_catalog_does(opened: Store, plain: dict[str, str]) -> None:
    parsed = Page(plain["1"])
    [facts] = opened.table("SELECT * FROM requests WHERE request_id = 1")
    for digest in ("model_in_digest", "model_out_digest"):
        assert facts[digest] in parsed.text
    assert facts["reason"] in parsed.text
    assert opened.rows("SELECT digest FROM receipts WHERE request_id = 1")[0][0] in parsed.text
    assert "The file in the store has this digest." in parsed.text

    names = {"forget": "forgotten", "retained": "retained", "holdout": "held-out"}
    losses = {
        (names[role], metric): values
        for role, metric, *values in opened.rows(
            """SELECT role, metric, samples, before, after, change, worst_change FROM collateral
               WHERE request_id = 1"""
        )
    }
    shown = {(r[0], r[1]): [value(cell) for cell in r[2:]] for r in parsed.table("records")}
    assert shown.keys() == losses.keys()
    for key, values in losses.items():
        assert shown[key] == pytest.approx(values, abs=6e-5)

    ledger = opened.rows(
        """SELECT id, role, loss_before, loss_after, rise, forecast_rise FROM ledger
           WHERE request_id = 1 ORDER BY rise DESC, role, id LIMIT 20"""
    )
    for row, (name, role, *values) in zip(parsed.table("record"), ledger, strict=True):
        assert row[:2] == [name, names[role]]
        assert [value(cell) for cell in row[2:]] == pytest.approx(values, abs=6e-5)

    path = opened.rows(
        """SELECT dose, forget_loss, forecast_loss, retained_loss, holdout_loss, chosen FROM paths
           WHERE request_id = 1 ORDER BY dose"""
    )
    for row, (*numbers, chosen) in zip(parsed.table("dose"), path, strict=True):
        assert [value(cell) for cell in row[:-1]] == pytest.approx(numbers, rel=1e-4, abs=6e-5)
        assert (row[-1] == "chosen") == chosen


def test_the_heat_map_is_that_of_the_catalog(
    opened: Store, asked: Tiny, plain: dict[str, str]
) -> None:
    texts = {row["id"]: row["text"] for row in texts_in(asked.data)}
    rows = opened.rows(
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


def test_evaluations_and_their_reference_are_shown(opened: Store, plain: dict[str, str]) -> None:
    html = plain["1"]
    parsed = Page(html)
    [(passed, settings)] = opened.rows("SELECT passed, settings FROM evaluations")
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
    [(reference,)] = opened.rows(
        "SELECT avg(reference) FROM evidence WHERE role = 'forget' AND metric = 'loss'"
    )
    assert f"never saw the records: {reference:.3f}" in " ".join(parsed.text.split())
    assert "Loss while the forgotten is taught again" in html
    assert [row[0] for row in parsed.table("step")] == ["0", "1", "2"]
    assert opened.rows("SELECT reference_digest FROM evaluations")[0][0] in parsed.text
    at = next(n for n, row in enumerate(parsed.table("measure")) if row[0].startswith("loss mean"))
    of_loss = {row[-4]: row[-3:] for row in parsed.table("measure")[at : at + 4]}
    assert value(of_loss["forgotten"][-1].split()[0]) == pytest.approx(reference, rel=1e-4)
    for role, name in (("neighbour", "nearest"), ("retained", "retained")):
        [kept] = opened.rows(
            """SELECT original, original_low, original_high, model, model_low, model_high,
                      reference, reference_low, reference_high FROM evidence
               WHERE role = ? AND metric = 'loss' AND id IS NULL""",
            [role],
        )
        shown = [
            value(part) for cell in of_loss[name] for part in cell.replace(" to ", " ").split()
        ]
        assert shown == pytest.approx(kept, rel=5e-3)
    assert "None was made." in Page(plain["3"]).text


def test_neighbours_have_rows_of_their_own(
    copied: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large store follows those who are about to be hit; so does this one, of few retained."""
    monkeypatch.setattr(audience, "RETAINED_MEASURED", 2)
    monkeypatch.setattr(neighbours, "NEIGHBOURS_MEASURED", 3)
    with Store.open(copied.store) as store:
        settings = ForgetSettings(direction="applied", dose="3", max_holdout_increase=9)
        forget(store, ["p-07"], copied.model, tmp_path / "out", settings)
        html = page.request_page(store, 1)
        [losses] = store.rows(
            "SELECT avg(before), avg(after), max(after - before) FROM scores WHERE "
            "role = 'neighbour' AND metric = 'loss'"
        )
        names = {n for (n,) in store.rows("SELECT id FROM ledger WHERE role = 'neighbour'")}
        with store.transaction() as connection:
            connection.execute("UPDATE scores SET role = 'bystander' WHERE role = 'neighbour'")
        later = page.request_page(store, 1)  # a role that this release does not know
        redacted = page.request_page(store, 1, redacted=True)
    rows = {row[0]: row[2:] for row in Page(html).table("records")}
    assert list(rows) == ["forgotten", "neighbour", "retained", "held-out"]
    before, after, worst = losses
    expected = [3, before, after, after - before, worst]
    assert [value(cell) for cell in rows["neighbour"]] == pytest.approx(expected, abs=6e-5)
    assert {row[0] for row in Page(html).table("record") if row[1] == "neighbour"} == names
    assert ">neighbour</text>" in html
    assert "2 retained records, 3 neighbours and 8 held-out ones" in Page(html).text
    for changed in (later, redacted):
        rows = {row[0]: row[2:] for row in Page(changed).table("records")}
        assert list(rows) == ["forgotten", "retained", "held-out", "bystander"]
        assert ">bystander</text>" in changed
    assert not any(name in redacted for name in names)


def test_commands_in_what_was_said_are_code() -> None:
    assert page._marked("a `b <c>` d & e") == "a <code>b &lt;c&gt;</code> d &amp; e"


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
    assert "none: trained again" in exact.text
    assert f"torch{version('torch')}" in re.sub(r"\s", "", exact.text)
    assert not [table for table in exact.tables if table[0][0] == "dose"]
    none = Page(plain["3"])
    assert "No checkpoint was written" in none.text
    assert "This request has no receipt" in none.text
    assert none.text.count("Nothing: no checkpoint was written.") == 1


def test_the_page_of_a_run(opened: Store, plain: dict[str, str]) -> None:
    parsed = Page(plain["run"])
    epochs = dict(opened.rows("SELECT epoch, avg(loss) FROM exposures GROUP BY epoch"))
    held_out = dict(opened.rows("SELECT epoch, avg(loss) FROM holdout_losses GROUP BY epoch"))
    table = parsed.table("epoch")
    assert [int(row[0]) for row in table] == sorted(held_out) == [0, 1, 2]
    for epoch, _, members, holdout in table:
        assert value(holdout) == pytest.approx(held_out[int(epoch)], abs=6e-5)
        if members != "–":
            assert value(members) == pytest.approx(epochs[int(epoch)], abs=6e-5)
    assert [row[0] for row in parsed.table("request")] == ["1", "2", "3"]
    kinds = {kind for (kind,) in opened.rows("SELECT kind FROM segments")}
    assert {row[0] for row in parsed.table("kind")} == kinds
    [(median,)] = opened.rows("SELECT median(relative_error) FROM exposures")
    assert f"median {median:.5g}" in parsed.text
    assert opened.run()["checkpoint_digest"] in parsed.text


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
            outcome = "UPDATE scores SET outcome = ? WHERE request_id = ? AND role = 'forget'"
            connection.execute(outcome, [verdict, number])
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
            """UPDATE scores SET outcome = 'partly' WHERE request_id = 2 AND role = 'forget'
               AND sample_id = (SELECT min(sample_id) FROM scores WHERE request_id = 2
                                AND role = 'forget')"""
        )
    assert "3 requests, 3 open, 3 overdue." in Page(page.index_page(changed, day)).text
    assert "partly" in [v for (v,) in changed.rows("SELECT verdict FROM forgotten")]
    with changed.transaction() as connection:
        connection.execute("UPDATE scores SET outcome = NULL")  # as releases before left it
    with changed.transaction() as connection:
        connection.execute(
            """UPDATE requests SET verdict = if(request_id = 1, 'forgotten', 'partly')
               WHERE request_id < 3"""
        )
    clocks = {row[0]: row[2:6] for row in Page(page.index_page(changed, day)).table("request")}
    assert clocks["1"] == clocks["2"] == ["2027-01-31", "2027-02-28", "2027-01-31", "done"]


# -- how it looks --------------------------------------------------------------------------------

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def chromium(file: Path, *options: str) -> None:
    """Open a page in a browser without a window."""
    common = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    profile = f"--user-data-dir={file.parent / 'profile'}"
    command = [str(CHROMIUM), *common, profile, *options, file.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to draw the page")
@pytest.mark.parametrize("name", ["1", "run", "index"])
def test_it_is_light_or_dark_as_the_reader_prefers(
    name: str, plain: dict[str, str], tmp_path: Path
) -> None:
    file, shot = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(plain[name])
    for dark, paper, accent in ((0, "#ffffff", "#0b6b6b"), (1, "#14181b", "#5cc4be")):
        prefers = f"--blink-settings=preferredColorScheme={1 - dark}"
        chromium(file, prefers, "--window-size=900,3000", f"--screenshot={shot}")
        drawn = (imread(shot)[..., :3] * 255).round().astype(int)
        assert "#{:02x}{:02x}{:02x}".format(*drawn[2, 2]) == paper
        lit = (drawn == [int(accent[at : at + 2], 16) for at in (1, 3, 5)]).all(-1)
        assert lit.any()  # the bar beside the verdict
        assert lit[400:].any() == (name != "index")  # lines of charts below it


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to print the page")
def test_it_prints(plain: dict[str, str], tmp_path: Path) -> None:
    file, printed = tmp_path / "page.html", tmp_path / "page.pdf"
    file.write_text(plain["1"])
    chromium(file, "--no-pdf-header-footer", f"--print-to-pdf={printed}")
    pdf = printed.read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert pdf.rstrip().endswith(b"%%EOF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) > 1
