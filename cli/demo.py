"""``gradstore demo``."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import click

from .output import emit, hush, progress_bar, say


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="New folder for everything it makes.  [default: gradstore-demo, or -2, -3, ...]",
)
def demo(out: Path | None) -> None:
    """Train, capture, forget and ask, on fictional people (offline, about a minute).

    \b
    Example:
      gradstore demo
    """
    names = itertools.chain(["gradstore-demo"], (f"gradstore-demo-{n}" for n in itertools.count(2)))
    folder = out or next(path for name in names if not (path := Path(name)).exists())
    if folder.exists():
        raise click.ClickException(f"{folder} exists; choose another --out")

    hush()
    from gradstore.demo import run_demo
    from gradstore.store import Store

    result = run_demo(folder, say, progress_bar)
    columns, rows = Store.open(folder / "store").query(result.sql)
    emit([dict(zip(columns, row, strict=True)) for row in rows], "table", columns)
    print(
        f"Asked for the phone number of {result.person['person']['name']} "
        f"({result.person['secret']}), the model says:"
    )
    for name, said in result.said.items():
        print(f"  {name:8}  {said}")
    for direction, outcome in result.outcomes.items():
        print(
            f"{direction}: {outcome.verdict}, dose {outcome.dose:.4g}: {outcome.reason}"
            if outcome.dose
            else f"{direction}: {outcome.verdict}: {outcome.reason}"
        )
    print(f"\nstore        {folder / 'store'}")
    print(
        f"checkpoints  {folder / 'trained'}, {folder / 'forgotten-applied'}, "
        f"{folder / 'forgotten-raw'}"
    )
    query = folder / "table.sql"
    query.write_text(result.sql + "\n")
    print(
        f"\nThis table again:\n  gradstore sql -s {shlex.quote(str(folder / 'store'))} - "
        f"< {shlex.quote(str(query))}\n\n{result.sql}"
    )
