"""``gradstore erase``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import output_options, store_option
from .output import emit_sections, say

if TYPE_CHECKING:
    from gradstore.store import Store

FAILED_CHECK = 3


def _reader(store: Store, model: Path | None) -> Callable[[Sequence[int]], str] | None:
    from gradstore.report.text import tokenizer_of

    left = [path for (path,) in store.rows("SELECT checkpoint FROM runs ORDER BY run_id DESC")]
    tokenizer = tokenizer_of(store, model, left)
    if tokenizer is None:
        return None
    return lambda ids: str(
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


@click.command()
@click.argument("ids", nargs=-1, required=True)
@store_option
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Checkpoint whose tokenizer reads the records, to search for their text.  "
    "[default: one that a run left]",
)
@click.option("--dry-run", is_flag=True, help="Show what would go, change nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_options
def erase(
    ids: tuple[str, ...],
    store_path: Path,
    model: Path | None,
    dry_run: bool,
    yes: bool,
    output: str,
) -> None:
    """Delete samples from the store: gradients, tokens, figures, rows. It cannot be undone.

    IDS are the samples' ids in full, trained on or held out. What is deleted here a model may still
    know: `gradstore forget` changes models, and needs the gradients, so forget first. Afterwards
    every byte of the store is searched for gradients, tokens, text and ids; exit code 3 says that
    something was found. Only hashes are kept, by which `gradstore ingest` refuses the same record.

    \b
    Examples:
      gradstore erase p-0007 -s store --dry-run
      gradstore erase p-0007 p-0031 -s store --yes
    """
    from gradstore.store import Store

    store = Store.open(store_path)

    from gradstore.upkeep.erase import erase as carry_out

    planned = carry_out(store, ids, dry_run=True)
    for id in planned.unforgotten:
        say(f"note: no request has made a model forget {id}; without its gradients none can")
    done, reads = planned, None
    if not dry_run:
        if planned.ids and not yes:
            if not sys.stdin.isatty():
                raise click.UsageError("nobody is there to ask: give --yes, or --dry-run to look")
            click.confirm(
                f"delete {', '.join(planned.ids)} from {store_path}?", abort=True, err=True
            )
        reads = _reader(store, model)
        done = carry_out(store, ids, reads=reads, progress=say)
    taken = [{"what": f"rows of {table}", "count": count} for table, count in done.rows.items()]
    taken.append({"what": "segments written again", "count": len(done.segments)})
    taken.append({"what": "updates of receipts", "count": len(done.updates)})
    found = done.search
    searched = []
    if found is not None:
        counts = {"files": found.files, "arrays": found.arrays, "bytes": found.bytes}
        searched = [counts | {"patterns": found.patterns, "hits": len(found.hits)}]
    hits = [] if found is None else [{"found": hit} for hit in found.hits]
    emit_sections({"taken": taken, "searched": searched, "hits": hits}, output, main="taken")
    if found is None:
        say("dry run: nothing was deleted")
        return
    if reads is None and done.ids:
        say("note: not searched for text: no checkpoint is left whose tokenizer reads it (--model)")
    for what in found.skipped:
        say(f"note: not searched for {what}: too short to be told from others")
    encrypted = store.format.encryption is not None
    backups = "backups of the catalog and of keys" if encrypted else "backups"
    say(
        f"out of reach: spare blocks of the disk, snapshots of the file system, {backups}, "
        "exports, checkpoints, tails of micro-batches and Adam's moments that it shared with others"
    )
    if hits:
        say(f"found in {len(hits)} places: {', '.join(found.hits[:5])}")
        raise SystemExit(FAILED_CHECK)
    say(f"{', '.join([*done.ids, *done.again])} erased: nothing was found in {found.bytes} bytes")
