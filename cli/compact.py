"""``gradstore compact``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import bytes_option, output_options, store_option
from .output import emit, progress_bar, say

_COLUMNS = (
    "first", "merged", "run", "kind", "records", "bytes_before", "segment", "bytes_after",
    "worst_cosine",
)  # fmt: skip


def _known(_: Any, __: Any, profile: str | None) -> str | None:
    from gradstore.store.format import PROFILES

    if profile is not None and profile not in PROFILES:
        raise click.BadParameter(f"{profile!r} is none of {', '.join(PROFILES)}")
    return profile


@click.command()
@store_option
@click.option(
    "--profile",
    callback=_known,
    help="How to write arrays, as in `gradstore init`: packed, raw or small.  "
    "[default: the store's]",
)
@bytes_option("--segment-size", "64MB", "Merge neighbours that take no more than this together.")
@click.option(
    "--lossy",
    is_flag=True,
    help="Let small round factors to eight bits. Nothing brings back what was there before.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be rewritten, change nothing.")
@output_options
def compact(
    store_path: Path,
    profile: str | None,
    segment_size: int,
    lossy: bool,
    dry_run: bool,
    output: str,
) -> None:
    """Merge small segments, and rewrite those of another profile. No record is lost.

    Many short runs leave many small segments, which take more room and time to read. With --profile
    the whole store is rewritten in that profile, which it then keeps for what is ingested later.
    Values stay the same to the bit, but for --profile small, which rounds and so wants --lossy: the
    table then has the worst cosine of a row with what it was, at least 0.9999. Out of small, values
    stay as they were rounded. Sketches of what was rewritten go: `gradstore sketch` makes them
    again. A command that reads the store meanwhile may have to be run again.

    \b
    Examples:
      gradstore compact -s store --dry-run
      gradstore compact -s store --profile raw
      gradstore compact -s store --profile small --lossy
    """
    from gradstore.store import Store

    store = Store.open(store_path)

    from gradstore.upkeep.compact import compact as carry_out

    with progress_bar("rewriting segments") as progress:
        done = carry_out(
            store,
            profile=profile,
            size=segment_size,
            lossy=lossy,
            dry_run=dry_run,
            progress=progress,
        )
    runs = dict(store.rows("SELECT run_id, name FROM runs"))
    rows = [
        {
            "first": one.replaces[0],
            "merged": len(one.replaces),
            "run": runs[one.run_id],
            "kind": one.kind,
            "records": one.records,
            "bytes_before": one.before,
            "segment": one.path,
            "bytes_after": one.after,
            "worst_cosine": one.cosine,
        }
        for one in done
    ]
    emit(rows, output, _COLUMNS)
    merged, before = (sum(row[name] for row in rows) for name in ("merged", "bytes_before"))
    if not done:
        say("nothing to merge or to rewrite")
    elif dry_run:
        say(f"dry run: {merged} segments of {before} bytes would become {len(done)}")
    else:
        after = sum(one.after or 0 for one in done)
        say(f"{merged} segments of {before} bytes became {len(done)} of {after}")
    if cosines := [one.cosine for one in done if one.cosine is not None]:
        say(
            f"factors were rounded: the cosine of a row with what it was is at least {min(cosines)}"
        )
    if sketches := sum(one.sketches for one in done):
        say(f"the sketches of {sketches} went with them; make them again: gradstore sketch")
    if profile and not dry_run:
        say(f"what is ingested from now on is written {store.format.profile} too")
