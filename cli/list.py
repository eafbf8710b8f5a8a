"""``gradstore list``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import output_options, store_option
from .output import emit, say


@click.command("list")
@click.argument("prefix", default="")
@click.option(
    "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Most rows to print."
)
@click.option("--split", type=click.Choice(["train", "holdout"]), help="Only these.")
@store_option
@output_options
def list_(prefix: str, limit: int, split: str | None, store_path: Path, output: str) -> None:
    """List samples, newest first, or those whose id begins with PREFIX.

    \b
    Example:
      gradstore list p-00 -s store --limit 10
    """
    from gradstore.store import Store

    rows = Store.open(store_path).table(
        """SELECT s.id, s.split, s.tokens, count(e.epoch) AS gradients,
                  arg_min(e.loss, e.step) AS first_loss, arg_max(e.loss, e.step) AS last_loss,
                  (SELECT count(*) FROM forgotten f WHERE f.sample_id = s.sample_id) AS requests
           FROM samples s LEFT JOIN exposures e USING (sample_id)
           WHERE starts_with(s.id, ?) AND s.split = coalesce(?, s.split)
           GROUP BY ALL ORDER BY max(s.added_at) DESC, max(s.sample_id) DESC LIMIT ?""",
        [prefix, split, limit + 1],
    )
    emit(
        rows[:limit],
        output,
        ["id", "split", "tokens", "gradients", "first_loss", "last_loss", "requests"],
    )
    if len(rows) > limit:
        say(f"more than {limit}: narrow with a prefix or raise --limit")
