"""The sketches of a store: written beside its segments, and searched before they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from gradstore.capture.schedule import Schedule
from gradstore.errors import InfluenceError, StoreDamaged
from gradstore.influence.query import Query
from gradstore.influence.scan import Place
from gradstore.influence.sketch import Projection
from gradstore.store.arrays import write_array
from gradstore.store.catalog import lock
from gradstore.store.files import replace_durably, sync_tree, unlinked, write_durably, writing
from gradstore.store.manifest import MANIFEST, segment_path
from gradstore.store.record import Sides
from gradstore.store.sealed import SealedArray, open_array, slots_at, write_sealed
from gradstore.store.sealed_rows import keys_at
from gradstore.store.store import Store

FOLDER = "sketches"
SCHEME = "tensor-sketch-1"
SIZE = 1024
MANY = 20_000  # records, beyond which reading all of them takes minutes
_ROWS = 128  # multiplied together: a block in float32 stays in the cache

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sketches:
    """A run's sketches, mapped into memory: each of length 1 beside the length it had."""

    projection: Projection
    blocks: Sequence[Float[Tensor, "rows m"]]
    lengths: Float[Tensor, " n"]

    def products(self, vectors: Float[Tensor, "m c"]) -> Float[Tensor, "n c"]:
        """Every sketch, of length 1, times each column; float32."""
        found = torch.empty(len(self.lengths), vectors.shape[1])
        unpacked, start = torch.empty(_ROWS, vectors.shape[0]), 0
        for block in self.blocks:
            for rows in block.split(_ROWS):
                stop = start + len(rows)
                part = unpacked[: len(rows)].copy_(rows)
                torch.mm(part, vectors, out=found[start:stop])
                start = stop
        return found


def sketch(
    store: Store,
    *,
    size: int | None = None,
    seed: int = 0,
    run: str | int | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[int, int]:
    """Sketch the segments of a run that have no current sketch; returns how many, of how many.

    ``size`` numbers each: by default as many as there are already, else 1,024; those of another
    size or seed are made anew. Sketches whose segment is gone are removed. What is sketched is the
    whole stored gradient, both sides of a tied embedding where both are stored.
    """
    facts, (rows, columns) = store.run(run), (store.model.vocabulary, store.model.width)
    segments = _segments(store, facts)
    sides: Sides | None = None if store.model.tied else "input"  # an untied head: another weight
    with lock(store.root / "sketches.lock", 0, "sketching"):
        remove_orphans(store)
        before = [_kept(_folder(store, path)) for _, path, _ in segments]
        size = size or next((said["size"] for _, said in before if said), SIZE)
        projection = Projection(size, seed, (rows, columns))
        missing = [
            segment
            for segment, (_, said) in zip(segments, before, strict=True)
            if not _is_current(said, projection, segment[2])
        ]
        for done, (number, path, digest) in enumerate(missing):
            progress(done, len(missing))
            places = store.rows(
                """SELECT row_start, "rows", token_start, tail_row FROM exposures
                   WHERE segment_id = ? ORDER BY row_start""",
                [number],
            )
            found = projection.of_segment(
                segment_path(store.root, path), [Place(*p) for p in places], sides
            )
            of = segment_path(store.root, path)
            _write(_folder(store, path), found, _facts(projection, digest), of, places)
        progress(len(missing), len(missing))
    return len(missing), len(segments)


def open_sketches(store: Store, run: Mapping[str, Any]) -> Sketches:
    """All sketches of a run, in the order of segments and of rows in them.

    Raises :class:`InfluenceError` unless every segment has one, as it is now and drawn alike.
    """
    segments = _segments(store, run)
    kept = [_kept(_folder(store, path)) for _, path, _ in segments]
    size, seed = next(((said["size"], said["seed"]) for _, said in kept if said), (0, 0))
    projection = Projection(size, seed, (store.model.vocabulary, store.model.width))
    stale = sum(
        not _is_current(said, projection, digest)
        for (_, _, digest), (_, said) in zip(segments, kept, strict=True)
    )
    if stale or not segments:
        raise InfluenceError(
            f"{stale} of the {len(segments)} segments of {run['name']} have no sketches, or those "
            "of other contents or another size; make them with "
            f"`gradstore sketch -s {store.root} --run {run['name']}`"
        )
    lengths = torch.tensor([length for _, said in kept for length in said["lengths"]])
    return Sketches(projection, [block for block, _ in kept if block is not None], lengths)


def remove_orphans(store: Store) -> None:
    """Remove sketches of segments that are no more: what is erased is to be gone from here too."""
    kept = {_folder(store, path) for (path,) in store.rows("SELECT path FROM segments")}
    for folder in (store.root / FOLDER).glob("r[0-9]*/*"):
        if folder not in kept:
            shutil.rmtree(unlinked(folder, store.root))


def worthwhile(store: Store, run: Mapping[str, Any]) -> int | None:
    """How many records to nominate by default; None for a run of so few that all can be read.

    Raises :class:`InfluenceError` where there are many and sketches are missing or stale.
    """
    [(records,)] = store.rows(
        "SELECT count(DISTINCT sample_id) FROM exposures WHERE run_id = ?", [run["run_id"]]
    )
    if records <= MANY:
        return None
    open_sketches(store, run)
    return max(1000, int(records) // 50)


def nominated(
    store: Store,
    run: Mapping[str, Any],
    queries: Sequence[Query],
    count: int,
    *,
    epochs: str = "all",
    cosine: bool = False,
) -> list[list[int]]:
    """For each query the numbers of the ``count`` records whose scores, by sketches, are highest.

    Scores are those of :class:`gradstore.influence.top.Settings`, with estimated products. Raises
    :class:`InfluenceError` for sketches that are missing or stale.
    """
    sketches = open_sketches(store, run)
    exposures = store.columns(
        """SELECT sample_id, epoch, learning_rate * batch_share * grad_scale AS weight
           FROM exposures WHERE run_id = ? ORDER BY segment_id, row_start""",
        [run["run_id"]],
    )
    sample, epoch = exposures["sample_id"], exposures["epoch"]
    weight = np.ones(1) if cosine else exposures["weight"] * sketches.lengths.numpy()
    wanted = _wanted(sample, epoch, epochs)
    found, vectors = [], []
    for query in queries:
        for number, gradient in query.gradients.items():
            vector = sketches.projection.of(gradient)
            vectors.append(normalize(vector, dim=0) if cosine else vector)
            found.append((query, number))
    if not vectors:
        return [[] for _ in queries]
    products = sketches.products(torch.stack(vectors, dim=1)).double().numpy() * weight[:, None]
    chosen = []
    for query in queries:
        scores, counted = np.zeros(len(sample)), np.zeros(len(sample), bool)
        for column, (of, number) in enumerate(found):
            if of is query:
                rows = wanted if number is None else wanted & (epoch == number)
                scores[rows], counted[rows] = products[rows, column], True
        chosen.append(_highest(sample[counted], scores[counted], count, mean=cosine))
    return chosen


# -- inside ----------------------------------------------------------------------------------


def _wanted(sample: NDArray[Any], epoch: NDArray[Any], epochs: str) -> NDArray[np.bool_]:
    """Which exposures are asked for; of ``first`` each record's earliest."""
    if epochs == "first":
        earliest = np.full(sample.max(initial=0) + 1, np.iinfo(epoch.dtype).max, epoch.dtype)
        np.minimum.at(earliest, sample, epoch)
        first: NDArray[np.bool_] = epoch == earliest[sample]
        return first
    schedule = Schedule.parse(epochs)
    return np.isin(epoch, [e for e in np.unique(epoch).tolist() if schedule.wants(e, None)])


def _highest(
    sample: NDArray[Any], scores: NDArray[np.float64], count: int, *, mean: bool
) -> list[int]:
    """The records with the highest sums over their exposures, or means, in no order."""
    totals, counts = np.bincount(sample, scores), np.bincount(sample)
    present = np.flatnonzero(counts)
    values = totals[present] / (counts[present] if mean else 1)
    if count < len(present):
        present = present[np.argpartition(-values, count)[:count]]
    return [int(number) for number in present]


def _segments(store: Store, run: Mapping[str, Any]) -> list[tuple[int, str, str]]:
    """Number, path and digest of the segments that hold a run's gradients."""
    return store.rows(
        """SELECT segment_id, path, digest FROM segments
           WHERE run_id = ? AND kind = 'gradients' ORDER BY segment_id""",
        [run["run_id"]],
    )


def _folder(store: Store, path: str) -> Path:
    """Where the sketches of the segment at a path lie: r0/000001 beside that of ``segments``."""
    beside = segment_path(store.root, path).relative_to(store.root / "segments")
    return unlinked(store.root / FOLDER / beside, store.root)


def _kept(folder: Path) -> tuple[Tensor | None, dict[str, Any]]:
    """The sketches in a folder, mapped without an open file, and what they say of themselves.

    Sealed ones are read into memory, under the keys of the segment that they are of.
    Damaged ones, and those of another scheme, are as good as none: they can be made again.
    """
    try:
        keys = keys_at(_segment(folder))
        array = open_array(folder.parent, folder.name, keys, "sketch")
        if array.attributes.get("scheme") != SCHEME:
            return None, {}
        if isinstance(array, SealedArray):
            return torch.from_numpy(array.read()), array.attributes
        file, size = str(array.raw_file()), array.shape[0] * array.shape[1]
    except StoreDamaged:
        return None, {}
    rows = torch.from_file(file, size=size, dtype=torch.float16).view(array.shape)
    return rows, array.attributes


def _segment(folder: Path) -> Path:
    """The segment that the sketches in a folder are of."""
    return folder.parents[2] / "segments" / folder.parent.name / folder.name


def _facts(projection: Projection, digest: str) -> dict[str, Any]:
    """What sketches must say of themselves to be used for a segment of this digest."""
    size, seed, shape = projection.size, projection.seed, list(projection.shape)
    return {"scheme": SCHEME, "size": size, "seed": seed, "gradient": shape, "segment": digest}


def _is_current(said: Mapping[str, Any], projection: Projection, digest: str) -> bool:
    return _facts(projection, digest).items() <= said.items()


def _write(
    folder: Path, found: Tensor, facts: Mapping[str, Any], segment: Path, places: Sequence[Any]
) -> None:
    """Put an array of sketches in place of an older one; a crash leaves none or a whole one."""
    lengths = found.norm(dim=1)
    units = (found / lengths.clamp(min=1e-30)[:, None]).half().numpy()
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(temporary):
        said = {**facts, "lengths": lengths.tolist()}
        if (keys := keys_at(segment)) is None:
            files = write_array(temporary, units, "raw", said)
        else:  # each under its record's key, so that shredding that reaches it too
            slots = slots_at(segment, keys, [start for start, *_ in places])
            spans = [(slot, 1) for slot in slots]
            files = write_sealed(temporary, "sketch", units, "raw", said, keys, spans)
        write_durably(temporary / MANIFEST, [json.dumps({"files": files}).encode()])
        sync_tree(temporary)
        shutil.rmtree(folder, ignore_errors=True)
    replace_durably(temporary, folder)
