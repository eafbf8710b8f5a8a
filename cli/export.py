"""``gradstore export``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import output_options, store_option
from .output import emit

FORMATS = ("safetensors", "npz")


@click.command()
@click.argument("ids", nargs=-1)
@click.argument("out", type=click.Path(path_type=Path))
@store_option
@click.option("--tables", is_flag=True, help="Tables and views as Parquet, into the folder OUT.")
@click.option("--gradients", is_flag=True, help="The gradients of IDS, into the file OUT.")
@click.option(
    "--format",
    type=click.Choice(FORMATS),
    help="Format of the gradients.  [default: by the ending of OUT]",
)
@click.option("--dense", is_flag=True, help="Add the dense gradients (V×d each).")
@click.option("--run", help="Run whose gradients to export.  [default: the newest]")
@click.option("--epoch", type=click.IntRange(min=1), help="Only this epoch's.  [default: all]")
@click.option("--force", is_flag=True, help="Replace files that are there.")
@output_options
def export(
    ids: tuple[str, ...],
    out: Path,
    store_path: Path,
    tables: bool,
    gradients: bool,
    format: str | None,
    dense: bool,
    run: str | None,
    epoch: int | None,
    force: bool,
    output: str,
) -> None:
    """Write what a store holds into files that other tools open.

    IDS are the samples' ids, or beginnings of ids that only one sample has. What is written is
    personal data, as the store is.

    \b
    Examples:
      gradstore export --tables tables -s store
      gradstore export --gradients p-0007 p-0048 gradients.safetensors -s store
      gradstore export --gradients p-0007 dense.npz --dense --epoch 1 -s store
    """
    if tables == gradients:
        raise click.UsageError("say what to export: either --tables or --gradients")
    if tables and (ids or format or dense or run or epoch):
        raise click.UsageError("--tables takes a folder and no ids, and goes with --force alone")
    if gradients and not ids:
        raise click.UsageError("name the ids to export before the file: --gradients ID... OUT")
    chosen = format or out.suffix.removeprefix(".")
    if gradients and chosen not in FORMATS:
        raise click.UsageError(f"{out} does not end in .safetensors or .npz: add --format")

    from gradstore.store import Store

    store = Store.open(store_path)
    store.resolve(ids)  # an unknown id is told before torch is loaded

    from gradstore.store.export import export_gradients, export_tables

    if tables:
        written = export_tables(store, out, force=force)
        emit([{"file": str(path), "rows": rows} for path, rows in written.items()], output)
        return
    records = export_gradients(
        store, ids, out, run=run, epoch=epoch, format=chosen, dense=dense, force=force
    )
    rows = [
        {"number": n, "id": one["id"], "run": one["run"], "epoch": one["epoch"], "file": str(out)}
        for n, one in enumerate(records)
    ]
    emit(rows, output)
