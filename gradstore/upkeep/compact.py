"""Compacting: small segments become larger ones, and those of another profile are written again.

Nothing is dropped, and no value changes but on the way to ``small``, if that is allowed: how well
each row keeps its direction there is measured before the old segment goes. One new segment takes
the place of several at a time, in one transaction, so that a crash leaves the old ones or the new
one, and the same command goes on from there. Only neighbours are merged: records stay in the order
in which they were written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from gradstore.errors import SettingsError
from gradstore.store import catalog, format, remote
from gradstore.store.files import SKETCHES
from gradstore.store.manifest import files_of, read_manifest, segment_path
from gradstore.store.quantize import is_factor
from gradstore.store.segment import SegmentReader
from gradstore.store.store import Store
from gradstore.store.writer import SEGMENT_BYTES
from gradstore.upkeep.erase import resume
from gradstore.upkeep.recovery import alone
from gradstore.upkeep.rewrite import KINDS, SMALL, rewrite, shape
from gradstore.upkeep.segments import check_segment

LEAST = 0.9999  # the cosine of a row of a factor with what it was, in profile small
_BLOCK = 1024  # rows compared at once
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Compaction:
    """Segments whose place one new segment takes; bytes are those of their files.

    ``path`` and ``after`` are None in a dry run. ``sketches`` counts the segments whose sketches
    went with them. ``cosine`` is the smallest of a rounded row with what it was; None if none was.
    """

    replaces: list[str]
    run_id: int
    kind: str
    records: int
    before: int
    path: str | None = None
    after: int | None = None
    sketches: int = 0
    cosine: float | None = None


def compact(
    store: Store,
    *,
    profile: str | None = None,
    size: int = SEGMENT_BYTES,
    lossy: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[Compaction]:
    """Merge gradients into segments of up to about ``size`` bytes, and write all in one profile.

    Merged are neighbours of one run, rank and shape that take no more than ``size`` together.
    ``profile`` is the store's own unless given; the store keeps it for what is ingested later, once
    all its segments have it. What is rewritten is compared with its digests first, for the new
    segment's would be those of the damage too: raises :class:`StoreDamaged`. Raises ``ValueError``
    for a profile that does not exist, :class:`SettingsError` where values would be rounded and
    ``lossy`` does not allow it, :class:`StoreBusy` while another process ingests, sketches or
    erases, :class:`StoreUnwritable` and :class:`StoreUnreachable`; what was compacted before that
    stays so.
    """
    profile = profile or store.format.profile
    if profile not in format.PROFILES:
        raise ValueError(f"profile is {profile!r}; expected one of {format.PROFILES}")
    _check_rounding(store, profile, lossy)
    if dry_run:
        return [_planned(group) for group in _groups(store, profile, size)]
    if (store.root / catalog.ERASING).exists():
        resume(store)
    with alone(store):
        groups, done = list(_groups(store, profile, size)), list[Compaction]()
        for group in groups:
            progress(len(done), len(groups))
            done.append(_compact(store, group, profile))
        progress(len(done), len(groups))
        stated = format.load(store.root)
        if stated.profile != profile:
            store.format = replace(stated, profile=profile)
            store.format.save(store.root)
    return done


# -- inside ----------------------------------------------------------------------------------


def _check_rounding(store: Store, profile: str, lossy: bool) -> None:
    """Eight bits are another value than sixteen: what cannot be taken back is asked for."""
    if profile != SMALL:
        return
    if store.format.dtype != "bfloat16":
        raise SettingsError(
            f"profile small rounds bfloat16, and this store keeps {store.format.dtype}: ingest "
            "into a new store, made by `gradstore init STORE --profile small`"
        )
    others = {name for (name,) in store.rows("SELECT DISTINCT profile FROM segments")} - {SMALL}
    if others and not lossy:
        raise SettingsError(
            f"writing {', '.join(sorted(others))} as small rounds factors to eight bits, which "
            f"nothing takes back (every row's cosine stays at least {LEAST}); if that is meant: "
            "`gradstore compact --profile small --lossy`"
        )


Segment = Mapping[str, Any]  # a row of the table of segments


def _groups(store: Store, profile: str, size: int) -> Iterator[list[Segment]]:
    """The segments that are to become one each, in the order of their records."""
    rows = [row for row in store.table("FROM segments") if row["kind"] in KINDS]
    for _, lane in groupby(sorted(rows, key=lambda row: (_lane(row), _first(row))), key=_lane):
        group: list[Segment] = []
        for segment in lane:
            if group and not _fits(store.root, group, segment, size):
                yield from _worthwhile(group, profile)
                group = []
            group.append(segment)
        yield from _worthwhile(group, profile)


def _lane(segment: Segment) -> tuple[int, str, str]:
    return segment["run_id"], segment["path"].rpartition("/")[0], segment["kind"]


def _first(segment: Segment) -> int:
    """The number of the oldest segment that lives on in this one: its place among the others."""
    names = [segment["path"], *(segment.get("replaces") or ())]
    return min(int(name.rpartition("/")[2]) for name in names)


def _fits(root: Path, group: Sequence[Segment], segment: Segment, size: int) -> bool:
    if segment["kind"] != "gradients" or sum(s["bytes"] for s in (*group, segment)) > size:
        return False
    last, this = (segment_path(root, s["path"]) for s in (group[-1], segment))
    return shape(last) == shape(this)


def _worthwhile(group: list[Segment], profile: str) -> Iterator[list[Segment]]:
    if len(group) > 1 or group[0]["profile"] != profile:
        yield group


def _planned(group: Sequence[Segment]) -> Compaction:
    return Compaction(
        [segment["path"] for segment in group],
        group[0]["run_id"],
        group[0]["kind"],
        sum(segment["records"] for segment in group),
        sum(segment["bytes"] for segment in group),
    )


def _compact(store: Store, group: Sequence[Segment], profile: str) -> Compaction:
    planned = _planned(group)
    for segment in group:
        check_segment(store.root, segment["path"], segment["digest"])
    old = [segment_path(store.root, name) for name in planned.replaces]
    new = rewrite(store.root, old, lambda _: True, profile)
    rounds = profile == SMALL and any(segment["profile"] != SMALL for segment in group)
    cosine = _worst_cosine(old, new) if rounds else None
    remote.send(store.root, new)
    name, manifest = new.relative_to(store.root).as_posix(), read_manifest(new)
    with store.transaction() as connection:
        catalog.commit_segment(connection, name, manifest)
    sketched = store.root / SKETCHES
    sketches = sum((sketched / path.relative_to(store.root / "segments")).exists() for path in old)
    for path in old:
        remote.discard(store.root, path)
    after = manifest["segment"]["bytes"]
    return replace(planned, path=name, after=after, sketches=sketches, cosine=cosine)


def _worst_cosine(old: Sequence[Path], new: Path) -> float:
    """The smallest cosine of a factor's row, as it is read from ``new``, with what it was."""
    worst, readers, after = 1.0, [SegmentReader(path) for path in old], SegmentReader(new)
    for name in filter(is_factor, {file.partition("/")[0] for file in files_of(new)}):
        at = 0
        for before in readers:
            for start in range(0, rows := before.rows(name), _BLOCK):
                stop = min(start + _BLOCK, rows)
                x, y = before.tensor(name, start, stop), after.tensor(name, at + start, at + stop)
                changed = (x.view(torch.int16) != y.view(torch.int16)).any(1)  # zeros and NaN stay
                cosines = cosine_similarity(x[changed].double(), y[changed].double())
                worst = min([worst, *cosines.tolist()])
            at += rows
    return worst
