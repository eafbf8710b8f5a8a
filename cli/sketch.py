"""``gradstore sketch``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import store_option
from .output import progress_bar, say


@click.command()
@store_option
@click.option(
    "--dim",
    type=click.IntRange(min=2, max=1 << 16),
    help="Numbers kept of each gradient.  [default: as many as there are, else 2048]",
)
@click.option("--run", help="Run whose gradients to sketch.  [default: the newest]")
def sketch(store_path: Path, dim: int | None, run: str | None) -> None:
    """Sketch a run's gradients, so that `gradstore top` need not read them all.

    A sketch is a random projection of a gradient, 2 bytes a dimension. `gradstore top` estimates
    all scores from the sketches and reads only the gradients of the most promising records. Run it
    again after more gradients were stored: those without a sketch get one.

    \b
    Examples:
      gradstore sketch -s store
      gradstore top --id p-0048 -s store --coarse 1000
    """
    from gradstore.store import Store

    store = Store.open(store_path)
    facts = store.run(run)

    from gradstore.influence.sketches import sketch as make

    with progress_bar("sketching segments") as progress:
        made, of = make(store, size=dim, run=run, progress=progress)
    say(f"{made} of the {of} segments of {facts['name']} were sketched; the others were already")
