"""``gradstore report``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import store_option
from .output import hush, say

_path = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("number", metavar="[REQUEST]", type=click.IntRange(min=1), required=False)
@store_option
@click.option("--out", type=_path, required=True, help="The HTML file to write.")
@click.option("--run", help="Report on a training run, by its name, instead.")
@click.option("--index", is_flag=True, help="List all requests with their statutory clock instead.")
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Checkpoint whose tokenizer reads the records.  [default: the request's own]",
)
@click.option("--redact", is_flag=True, help="Leave out ids, text and paths.")
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
def report(
    number: int | None,
    store_path: Path,
    out: Path,
    run: str | None,
    index: bool,
    model: Path | None,
    redact: bool,
    force: bool,
) -> None:
    """Write a page that a person reads: on forget request REQUEST, on a run, or on all requests.

    It is one HTML file with all that belongs to it, needs no network and prints well. Without
    --redact it shows ids and text of records: handle it as personal data.

    \b
    Examples:
      gradstore report 1 -s store --out request-1.html
      gradstore report 1 -s store --out for-the-auditor.html --redact
      gradstore report --run run-1 -s store --out run-1.html
      gradstore report --index -s store --out requests.html
    """
    if [number is not None, run is not None, index].count(True) != 1:
        raise click.UsageError("say what to report on: a request's number, --run NAME, or --index")
    if model is not None and number is None:
        raise click.UsageError("--model reads a request's records: it goes with a request's number")
    from gradstore.store import Store

    store = Store.open(store_path)

    from gradstore.report import page

    page.check_out(out, force)  # told before torch is loaded
    if number is not None:
        hush()
        made = page.request_page(store, number, model=model, redacted=redact)
    elif run is not None:
        made = page.run_page(store, run, redacted=redact)
    else:
        made = page.index_page(store, page.today(), redacted=redact)
    page.save(made, out, force=force)
    say(f"wrote {out}")
