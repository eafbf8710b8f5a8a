"""``gradstore show``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import output_options, store_option
from .output import emit_sections


@click.command()
@click.argument("id")
@store_option
@output_options
def show(id: str, store_path: Path, output: str) -> None:
    """Show one sample: its stored gradients, and the requests that named or measured it.

    ID may be the beginning of an id that only one sample has.

    \b
    Example:
      gradstore show p-0007 -s store
    """
    from gradstore.store import Store

    store = Store.open(store_path)
    [(_, number)] = store.resolve([id]).items()
    sample = store.table(
        "SELECT id, split, tokens, added_at FROM samples WHERE sample_id = ?", [number]
    )
    gradients = store.table(
        """SELECT run, epoch, step, loss, d_norm, h_norm, relative_error, learning_rate,
                  batch_share, segment
           FROM gradients WHERE sample_id = ? ORDER BY run_id, epoch""",
        [number],
    )
    requests = store.table(
        """SELECT request_id, role, direction, dose, verdict, before AS loss_before,
                  after AS loss_after, model_out
           FROM scores JOIN requests USING (request_id)
           WHERE sample_id = ? AND metric = 'loss' ORDER BY request_id""",
        [number],
    )
    sections = {"sample": sample, "gradients": gradients, "requests": requests}
    emit_sections(sections, output, main="gradients")
