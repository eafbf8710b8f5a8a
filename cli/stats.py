"""``gradstore stats``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import output_options, store_option
from .output import emit


@click.command()
@store_option
@output_options
def stats(store_path: Path, output: str) -> None:
    """Show counts, sizes, and how much smaller the store is than dense gradients.

    \b
    Example:
      gradstore stats -s store
    """
    from gradstore.store import Store

    facts = Store.open(store_path).stats()
    if output == "table":
        emit([{"what": name, "value": value} for name, value in facts.items()], output)
    else:
        emit([facts], output)
