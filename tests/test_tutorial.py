"""The tutorial's commands run in order, and print what the page shows.

The demo is smaller here: figures, ids and what the model says are its own; all else is stable.
"""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from test_docs import blocks
from tiny import run as gradstore

from gradstore import demo

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
FIGURE = re.compile(r"p-\d+b?|[+-]?\d[\d.:-]*(e[+-]\d+)?|<--")


def commands(code: str) -> list[tuple[list[str], int]]:
    """The words of each command of a shell block, and the code that it is said to exit with."""
    found = []
    for command in re.split(r"\n(?=gradstore|export)", code.replace("\\\n", " ")):
        exits = re.search(r"# exits with (\d)", command)
        found.append((shlex.split(command, comments=True), int(exits[1]) if exits else 0))
    return found


def plain(line: str) -> str:
    """A line without its figures and rules, and with single spaces."""
    return " ".join(FIGURE.sub("#", line.replace("─", " ")).split())


def assert_shown(shown: str, printed: str) -> None:
    """Every line of the page is printed; ``...`` stands for anything."""
    lines = [plain(line) for line in printed.splitlines()]
    for line in shown.splitlines():
        if line.startswith("the model goes on:"):
            line = "the model goes on: ..."
        expected = re.escape(plain(line)).replace(re.escape("..."), ".*")
        assert any(re.fullmatch(expected, each) for each in lines), line


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "PEOPLE", 32)
    monkeypatch.setattr(demo, "HELD_OUT", 10)
    monkeypatch.setattr(demo, "OTHERS", 60)
    monkeypatch.setattr(demo, "BASE", replace(demo.BASE, epochs=1))
    monkeypatch.setattr(demo, "TUNING", replace(demo.TUNING, epochs=4))
    printed = ""
    for language, code in blocks(PAGE, "sh", "text"):
        if language == "text":
            assert_shown(code, printed)
            continue
        printed = ""
        for words, code_expected in commands(code):
            if words[0] == "export":
                monkeypatch.setenv(*words[1].split("=", 1))
                continue
            assert words[0] == "gradstore"
            printed += gradstore(*words[1:], code=code_expected).output
    assert (tmp_path / "demo" / "request-3.html").exists()
