"""``gradstore match``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import output_options, store_option
from .output import emit, say

_share = click.FloatRange(0, 1, min_open=True)


@click.command()
@click.argument("ids", nargs=-1, required=True)
@store_option
@click.option(
    "--jaccard",
    type=_share,
    default=0.5,
    show_default=True,
    help="Near from this share of common shingles (pairs of tokens, boilerplate left out).",
)
@click.option(
    "--edit",
    type=_share,
    default=0.8,
    show_default=True,
    help="Confirmed from this share of both in their longest common subsequence of tokens.",
)
@click.option(
    "--cosine",
    type=_share,
    default=0.6,
    show_default=True,
    help="Near from this cosine of their first gradients.",
)
@click.option("--run", help="Run whose records to compare.  [default: the newest]")
@click.option("--dry-run", is_flag=True, help="Show, write nothing.")
@output_options
def match(
    ids: tuple[str, ...],
    store_path: Path,
    jaccard: float,
    edit: float,
    cosine: float,
    run: str | None,
    dry_run: bool,
    output: str,
) -> None:
    """Find near-duplicates of samples: by their shingles or their gradients.

    IDS are the samples' ids, or beginnings of ids that only one sample has. What is found is kept
    in the catalog (view duplicates); `gradstore forget --with-duplicates` forgets it too.

    \b
    Examples:
      gradstore match p-0048 -s store
      gradstore match p-0048 p-0066 -s store --cosine 0.5 --json
    """
    from gradstore.store import Store

    store = Store.open(store_path)
    store.resolve(ids)  # an unknown id is told before torch is loaded

    from gradstore.unlearn.match import Thresholds, near_duplicates, record_matches

    thresholds = Thresholds(jaccard, edit, cosine)
    matches = near_duplicates(store, ids, thresholds, run=run)
    rows = [
        {
            "of": m.of,
            "id": m.id,
            "jaccard": m.jaccard,
            "edit": m.edit,
            "cosine": m.cosine,
            "by": " ".join(m.by),
        }
        for m in matches
    ]
    emit(rows, output, ["of", "id", "jaccard", "edit", "cosine", "by"])
    if not dry_run:
        record_matches(store, matches, thresholds, run)
    if not matches:
        say("no near-duplicates at these thresholds")
