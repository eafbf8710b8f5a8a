"""Pages of a tiny store with requests, made once in a session, and a reader of their HTML.

PYTEST_DONT_REWRITE: test modules import helpers from here, and name it as their plugin too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny import FAR, Tiny, run

from gradstore import Store
from gradstore.report import page

VOID = {"meta", "br", "wbr", "link", "img", "hr", "input"}


@pytest.fixture(scope="session")
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
def opened(asked: Tiny) -> Iterator[Store]:
    """Its store; tests only read it."""
    with Store.open(asked.store) as store:
        yield store


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
        elif tag == "br" and (self.inside("td") or self.inside("th")):
            self.tables[-1][-1][-1] += " "
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


@pytest.fixture(scope="session")
def plain(asked: Tiny) -> dict[str, str]:
    return pages(asked)


@pytest.fixture(scope="session")
def redacted(asked: Tiny) -> dict[str, str]:
    return pages(asked, redacted=True)


def pages(asked: Tiny, *, redacted: bool = False) -> dict[str, str]:
    store = Store.open(asked.store)
    found = {str(n): page.request_page(store, n, redacted=redacted) for n in (1, 2, 3)}
    found["run"] = page.run_page(store, "run-1", redacted=redacted)
    found["index"] = page.index_page(store, date(2031, 5, 6), redacted=redacted)
    return found
