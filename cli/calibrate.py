"""``gradstore calibrate``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import output_options, store_option
from .output import emit, hush, progress_bar, say


@click.command()
@store_option
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Checkpoint that the run wrote.",
)
@click.option(
    "--records",
    type=click.IntRange(min=2),
    default=8,
    show_default=True,
    help="Records to leave out: few, where they look alike.",
)
@click.option("--run", help="Run to calibrate.  [default: the one that wrote the checkpoint]")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the records.")
@click.option("--dry-run", is_flag=True, help="Train and compare, but keep nothing.")
@output_options
def calibrate(
    store_path: Path,
    model: Path,
    records: int,
    run: str | None,
    seed: int,
    dry_run: bool,
    output: str,
) -> None:
    """Measure how near forgetting comes to retraining on your own run, and set its dose by it.

    The run is trained again once, without some of its records; each is then forgotten and held
    against that model. What ends nearest becomes the default dose of single records, and how far
    their losses went tells the target of later requests. It costs a training.

    \b
    Example:
      gradstore calibrate -s store --model trained
    """
    from gradstore.store import Store

    store = Store.open(store_path)

    hush()

    from gradstore.unlearn.calibrate import calibrate as measure

    with progress_bar("training again") as bar:
        found = measure(
            store, model, records=records, run=run, seed=seed, dry_run=dry_run,
            progress=say, steps=bar,
        )  # fmt: skip
    emit([vars(one) for one in found], output)
    if dry_run:
        say("dry run: nothing was written")
