"""``gradstore schema``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import output_options, store_option
from .output import emit, emit_sections


@click.command()
@click.argument("name", required=False)
@store_option
@output_options
def schema(name: str | None, store_path: Path, output: str) -> None:
    """Print the catalog's tables, views and SQL functions, or one with its columns.

    \b
    Examples:
      gradstore schema
      gradstore schema neighbours
      gradstore schema exposures
    """
    from gradstore.store import Store

    tables, columns = Store.open(store_path).schema(name)
    if output != "table":
        emit(columns, output)
    elif name is None:
        emit(tables, output)
    else:
        emit_sections({tables[0]["comment"]: columns}, output, main="")
