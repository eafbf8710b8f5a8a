"""``gradstore audit``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from .options import output_options, store_option
from .output import emit, say

FAILED_CHECK = 3


@click.command()
@store_option
@click.option("--head", metavar="DIGEST", help="A digest kept elsewhere that must still be there.")
@output_options
def audit(store_path: Path, head: str | None, output: str) -> None:
    """List what was done to models and to the store, and check that nobody changed the list.

    Entries are chained by digests and hold no ids. Exit code 3 says that the chain is broken. It
    cannot show that the last entries are missing: keep the digest that is printed, and give it as
    --head later.

    \b
    Examples:
      gradstore audit -s store
      gradstore audit -s store --head 0f3c... --json
    """
    from gradstore.store import Store
    from gradstore.store.audit import COLUMNS, SELECT, check

    store = Store.open(store_path)
    rows = store.table(SELECT) if store.has("audit") else []
    emit(rows if output != "table" else [_short(row) for row in rows], output, COLUMNS)
    findings = check(rows, head)
    for finding in findings:
        say(finding)
    if findings:
        say("the audit chain is broken")
        raise SystemExit(FAILED_CHECK)
    if rows:
        say(f"the chain of {len(rows)} holds; head {rows[-1]['digest']}")
    else:
        say("nothing has been done yet")


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """For a table that fits the screen: JSON and CSV have all of it."""
    hashes = re.compile("[0-9a-f]{64}")
    return {
        name: hashes.sub(lambda found: f"{found[0][:8]}…", value) if type(value) is str else value
        for name, value in row.items()
    }
