"""``gradstore verify``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from .options import output_options, store_option
from .output import emit, progress_bar, say

FOUND_DAMAGE = 3
_SHOWN = 3  # ids in a cell; JSON has them all


@click.command()
@store_option
@click.option("--repair", is_flag=True, help="Make the store sound again with what is left of it.")
@click.option("--dry-run", is_flag=True, help="With --repair: only say what it would do.")
@output_options
def verify(store_path: Path, repair: bool, dry_run: bool, output: str) -> None:
    """Check every file of a store against its digest, and every row against its segment.

    What is found is printed: the file, what is wrong with it, whether that is damage or only worth
    knowing, and the ids of the samples it hits. Exit code 3 says that there is damage.

    --repair makes the catalog anew from the segments where it is damaged, and moves damaged
    segments into the folder quarantine; it deletes nothing but temporaries of killed writers. Then
    it checks again.

    \b
    Examples:
      gradstore verify -s store
      gradstore verify -s store --repair --dry-run
    """
    from gradstore.upkeep.verify import verify as examine

    if dry_run and not repair:
        raise click.UsageError("--dry-run says what --repair would do: give both")
    if repair:
        from gradstore.upkeep.repair import repair as mend

        with progress_bar("checking segments") as progress:
            actions = mend(store_path, progress, dry_run=dry_run)
        rows = [{"file": a.file, "did": a.did, "ids": _ids(a.ids, output)} for a in actions]
        emit(rows, output, ["file", "did", "ids"])
    with progress_bar("checking segments") as progress:
        findings = examine(store_path, progress)
    damaged = [finding for finding in findings if finding.damage]
    if repair:
        for finding in damaged:
            say(f"{'still damaged' if not dry_run else 'damaged'}: {finding.file} {finding.what}")
    else:
        found = [
            {
                "file": f.file,
                "what": f.what,
                "damage": f.damage,
                "ids": _ids(f.ids, output),
            }
            for f in findings
        ]
        emit(found, output, ["file", "what", "damage", "ids"])
        hint = f"; `gradstore verify -s {store_path} --repair` makes the best of it"
        say(f"{len(damaged)} damaged{hint}" if damaged else "the store is sound")
    if damaged:
        raise SystemExit(FOUND_DAMAGE)


def _ids(ids: Sequence[str], output: str) -> Sequence[str] | str:
    if output == "json":
        return list(ids)
    more = f" and {len(ids) - _SHOWN} more" if output == "table" and len(ids) > _SHOWN else ""
    return " ".join(ids[:_SHOWN] if more else ids) + more
