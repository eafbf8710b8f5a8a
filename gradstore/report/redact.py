"""Leave out of a page what names a person: ids, text, paths.

What stays: figures, digests, how many records and tokens there were and about how long each was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from gradstore.report import clock
from gradstore.report.evidence import Checkpoint, Evaluation
from gradstore.report.request import Request
from gradstore.report.run import Run
from gradstore.store.store import Store
from gradstore.unlearn.receipt import hash_id

_DIGEST = re.compile(r"[0-9a-f]{64}")
_WORDS = {  # settings whose values are words of gradstore's own
    "weights",
    "schedule",
    "optimizer",
    "architecture",
}
_SPACE = "\u2007"  # as wide as a digit: the style sheet frames and shades it
_WIDTHS = ((2, 2), (5, 4))  # up to so many characters
_LONG = 7


def names(store: Store) -> Callable[[str], str]:
    """The name of a sample in redacted pages: that of the receipts."""
    return lambda id: hash_id(store, id)


def request(facts: Request, name: Callable[[str], str]) -> Request:
    """The same without ids, text and paths; the notes are left out, as they may name records."""
    return replace(
        facts,
        before=_checkpoint(facts.before),
        after=None if facts.after is None else _checkpoint(facts.after),
        settings=_settings(facts.settings),
        notes=(),
        records=tuple(
            replace(
                record,
                name=name(record.name),
                opening=_block(record.opening),
                shown=tuple(replace(t, text=_block(t.text)) for t in record.shown),
            )
            for record in facts.records
        ),
        stays=tuple(replace(stay, name=name(stay.name)) for stay in facts.stays),
        evaluations=tuple(map(_evaluation, facts.evaluations)),
        redacted=True,
    )


def run(facts: Run) -> Run:
    """The same without paths and texts that a user chose, but for the run's name."""
    return replace(
        facts,
        checkpoint=None if facts.checkpoint is None else _checkpoint(facts.checkpoint),
        settings=_settings(facts.settings),
        model=_settings(facts.model),
        redacted=True,
    )


def rows(found: Iterable[clock.Row], name: Callable[[str], str]) -> tuple[clock.Row, ...]:
    """The same without ids."""
    return tuple(replace(row, names=tuple(map(name, row.names))) for row in found)


def _block(text: str) -> str:
    """A token's class of length: short, middle, long."""
    length = len(text.strip())
    return _SPACE * next((width for most, width in _WIDTHS if length <= most), _LONG)


def _checkpoint(found: Checkpoint) -> Checkpoint:
    """Without its path, which also stands for the digest of a model that is no folder."""
    known = _DIGEST.fullmatch(found.digest) is not None
    return Checkpoint(None, found.digest if known else "")


def _evaluation(found: Evaluation) -> Evaluation:
    original, reference = (
        None if each is None else _checkpoint(each) for each in (found.original, found.reference)
    )
    return replace(found, original=original, model=_checkpoint(found.model), reference=reference)


def _settings(found: Iterable[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (key, value)
        for key, value in found
        if value is None
        or isinstance(value, bool | int | float)
        or key in _WORDS
        or key.startswith("environment.")  # names and versions of libraries
    )
