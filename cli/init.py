"""``gradstore init``."""

from __future__ import annotations

from pathlib import Path

import click

from .output import say


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--profile",
    type=click.Choice(["packed", "raw", "small"]),
    default="packed",
    show_default=True,
    help="Compress arrays (bit shuffle and LZ4), keep them as they lie in memory, or keep factors "
    "in eight bits (each row's cosine with its bfloat16 at least 0.9999).",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Precision of the stored factors.",
)
def init(store: Path, profile: str, dtype: str) -> None:
    """Create an empty store.

    \b
    Example:
      gradstore init store
    """
    from gradstore.store import Store

    if (profile, dtype) == ("small", "float32"):
        raise click.UsageError(
            "--profile small keeps factors in eight bits: leave out --dtype float32, "
            "or choose --profile packed"
        )
    Store.create(store, profile=profile, dtype=dtype)
    say(f"created {store}; next: gradstore ingest DATA -s {store} --model MODEL --out CHECKPOINT")
