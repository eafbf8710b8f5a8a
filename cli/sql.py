"""``gradstore sql``."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import click

from .options import bytes_option, output_options, store_option
from .sandbox import answer


def _number(_: click.Context, __: click.Parameter, seconds: float) -> float:
    if math.isnan(seconds):  # it is in every range, for it is not less than any bound
        raise click.BadParameter("nan is no number of seconds")
    return seconds


@click.command()
@click.argument("query")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True, max=1e6),
    callback=_number,
    default=60,
    show_default=True,
    metavar="SECONDS",
    help="Stop the query after so long.",
)
@bytes_option("--memory-limit", "2GB", "Memory that the query may use.")
@store_option
@output_options
def sql(query: str, timeout: float, memory_limit: int, store_path: Path, output: str) -> None:
    """Run read-only SQL on the catalog ("-" reads it from standard input).

    \b
    Examples:
      gradstore sql "SELECT id, epoch, loss, d_norm FROM gradients ORDER BY d_norm DESC LIMIT 5"
      gradstore sql "SELECT id, grad_norm(id) FROM samples WHERE split = 'train'"
      gradstore sql "SELECT * FROM neighbours('p-0007', 5)"
      gradstore sql "SELECT * FROM influence(question := 1)"
      gradstore sql --json - < question.sql

    Functions over gradients: grad_norm, grad_dot, grad_cosine, neighbours, token_norms, influence
    (`gradstore schema` says what they take). They read the gradients that they are asked about.

    A query reaches no files, changes nothing, and is stopped at the limits.
    """
    answer(sys.stdin.read() if query == "-" else query, store_path, output, timeout, memory_limit)
