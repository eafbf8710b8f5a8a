"""``gradstore init``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import Bytes
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
@click.option(
    "--segments",
    "url",
    metavar="URL",
    help="Keep segments on another file system: s3://BUCKET/FOLDER, file:///FOLDER, or what else "
    "fsspec opens. The catalog stays in STORE.",
)
@click.option(
    "--cache-size",
    type=Bytes(),
    default="16GB",
    show_default=True,
    help="With --segments: how much of them is kept in STORE too.",
)
def init(store: Path, profile: str, dtype: str, url: str | None, cache_size: int) -> None:
    """Create an empty store.

    \b
    Examples:
      gradstore init store
      gradstore init store --segments s3://bucket/gradients
    """
    from gradstore.store import Store
    from gradstore.store.format import Elsewhere

    if (profile, dtype) == ("small", "float32"):
        raise click.UsageError(
            "--profile small keeps factors in eight bits: leave out --dtype float32, "
            "or choose --profile packed"
        )
    elsewhere = None if url is None else Elsewhere(url, cache_size)
    Store.create(store, profile=profile, dtype=dtype, elsewhere=elsewhere)
    say(f"created {store}; next: gradstore ingest DATA -s {store} --model MODEL --out CHECKPOINT")
