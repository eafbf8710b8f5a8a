"""``gradstore receipt``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import store_option
from .output import print_json

_number = click.argument("number", type=click.IntRange(min=1))


@click.group()
def receipt() -> None:
    """Show the receipts of forget requests.

    \b
    Example:
      gradstore receipt show 1 -s store
    """


@receipt.command()
@_number
@store_option
def show(number: int, store_path: Path) -> None:
    """Print the receipt of request NUMBER as JSON.

    \b
    Example:
      gradstore receipt show 1 -s store > receipt.json
    """
    from gradstore.store import Store
    from gradstore.unlearn.receipt import read

    print_json(read(Store.open(store_path), number))
