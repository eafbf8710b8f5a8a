"""Rows to stdout, talk to stderr."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Row = Mapping[str, Any]
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_UNBOUNDED = 100_000  # columns of a table that goes into a pipe: nothing is cut


def emit(rows: Sequence[Row], output: str, columns: Sequence[str] | None = None) -> None:
    """Print rows of one kind as JSON, CSV or a table."""
    names = list(columns if columns is not None else (rows[0] if rows else ()))
    if output == "json":
        print_json(rows)
    elif output == "csv":
        writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        stdout().print(_table(rows, names))


def emit_sections(sections: Mapping[str, Sequence[Row]], output: str, main: str) -> None:
    """Print several kinds of rows: one JSON object, tables under titles, or ``main`` as CSV."""
    if output == "json":
        print_json(sections)
    elif output == "csv":
        emit(sections[main], "csv")
    else:
        for name, rows in sections.items():
            if rows:
                stdout().print(_table(rows, list(rows[0]), title=name))


def say(text: str) -> None:
    """A line of talk, on stderr."""
    print(visible(text), file=sys.stderr)


def visible(text: str) -> str:
    """A text whose control characters, but for the ends of lines, are shown and not obeyed."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def hush() -> None:
    """Keep transformers' own bars and notices off the terminal: one bar is enough."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def stdout() -> Console:
    """A console on standard output that cuts nothing in a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _UNBOUNDED, highlight=False)


@contextmanager
def progress_bar(text: str) -> Iterator[Any]:
    """A progress bar on stderr; call what it yields with (done, of how many)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Remaining(),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(value: Any) -> None:
    """Print any value as JSON."""
    json.dump(_strict(value), sys.stdout, indent=1, default=str)
    sys.stdout.write("\n")


def _strict(value: Any) -> Any:
    """What JSON can say: NaN and infinity become null, keys text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _strict(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return value


def _table(rows: Sequence[Row], names: Sequence[str], title: str | None = None) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text  # says what it is given: a string's [red] and :star: mean something

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for name in names:
        numeric = all(isinstance(r[name], int | float | None) for r in rows) and bool(rows)
        table.add_column(
            Text(visible(name)), justify="right" if numeric else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(_cell(row[name])) for name in names))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    return visible(str(value))
