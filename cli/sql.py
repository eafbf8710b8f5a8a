"""``gradstore sql``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .options import output_options, store_option
from .output import emit


@click.command()
@click.argument("query")
@store_option
@output_options
def sql(query: str, store_path: Path, output: str) -> None:
    """Run read-only SQL on the catalog ("-" reads it from standard input).

    \b
    Examples:
      gradstore sql "SELECT id, epoch, loss, d_norm FROM gradients ORDER BY d_norm DESC LIMIT 5"
      gradstore sql "SELECT id, grad_norm(id) FROM samples WHERE split = 'train'"
      gradstore sql "SELECT * FROM neighbours('p-0007', 5)"
      gradstore sql --json - < question.sql

    Functions over gradients: grad_norm, grad_dot, grad_cosine, neighbours, token_norms (`gradstore
    schema` says what they take). They read the gradients of the ids that they are given.
    """
    from gradstore.store import Store

    text = sys.stdin.read() if query == "-" else query
    columns, rows = Store.open(store_path).query(text)
    names = [
        f"{name}_{earlier}" if (earlier := columns[:at].count(name)) else name
        for at, name in enumerate(columns)
    ]
    emit([dict(zip(names, row, strict=True)) for row in rows], output, names)
