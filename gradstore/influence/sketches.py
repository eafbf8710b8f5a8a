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

from gradstore.errors import InfluenceError, StoreDamaged
from gradstore.influence.rows import Place
from gradstore.influence.sketch import Projection
from gradstore.store.arrays import ZarrArray, write_array
from gradstore.store.catalog import lock
from gradstore.store.files import (
    SKETCHES,
    replace_durably,
    sync_tree,
    unlinked,
    write_durably,
    writing,
)
from gradstore.store.manifest import MANIFEST, segment_path
from gradstore.store.record import Sides
from gradstore.store.sealed import SealedArray, open_array, slots_at, write_sealed
from gradstore.store.sealed_rows import keys_at
from gradstore.store.store import Store

SCHEME = "tensor-sketch-1"
SIZE = 2048
NOMINATED = 1000  # by default: five times as many as find the ten highest of 9,244 records
MANY = 20_000  # records, beyond which reading all of them takes minutes
_FEW = 8  # columns, beyond which a product of matrices is faster
_IN_CACHE = 2048  # sketches that stay there from one column to the next
_BLOCK = 128  # multiplied together: a block in float32 stays in the cache

Progress = Callable[[int, int], None]
Segment = tuple[int, str, str]  # number, path and digest


@dataclass(frozen=True)
class Sketches:
    """A run's sketches, mapped into memory: each of length 1 beside the length it had."""

    projection: Projection
    blocks: Sequence[Float[Tensor, "rows m"]]
    lengths: Float[Tensor, " n"]

    def products(self, vectors: Float[Tensor, "m c"]) -> Float[Tensor, "n c"]:
        """Every sketch, of length 1, times each column; float32."""
        return multiplied(self.blocks, vectors)

    def some(self, rows: NDArray[np.int64]) -> Float[Tensor, "r m"]:
        """Sketches by their numbers, which ascend; float32."""
        found, begin, start = torch.empty(len(rows), self.projection.size), 0, 0
        for block in self.blocks:
            stop = int(rows.searchsorted(start + len(block)))
            part = torch.from_numpy(rows[begin:stop] - start)
            found[begin:stop] = block.index_select(0, part)
            begin, start = stop, start + len(block)
        return found


def multiplied(
    blocks: Sequence[Float[Tensor, "rows m"]], vectors: Float[Tensor, "m c"]
) -> Float[Tensor, "n c"]:
    """Rows of all blocks, in float16, times each column; float32.

    Few columns are rounded to float16 too, and rows multiplied without unpacking them: about as
    fast as they are copied. The error is a hundredth of that of an estimate by sketches.
    """
    found, start = torch.empty(sum(map(len, blocks)), vectors.shape[1]), 0
    if vectors.shape[1] <= _FEW:
        norms = vectors.norm(dim=0).clamp(min=1e-30)
        columns = (vectors / norms).half().T.contiguous()
        for block in blocks:
            for rows in block.split(_IN_CACHE):
                stop = start + len(rows)
                for number, column in enumerate(columns):
                    found[start:stop, number] = rows @ column
                start = stop
        return found.mul_(norms)
    unpacked = torch.empty(_BLOCK, vectors.shape[0])
    for block in blocks:
        for rows in block.split(_BLOCK):
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

    ``size`` numbers each: by default as many as there are already, else 2,048; those of another
    size or seed are made anew. Sketches whose segment is gone are removed. What is sketched is the
    whole stored gradient, both sides of a tied embedding where both are stored.
    """
    facts, (rows, columns) = store.run(run), (store.model.vocabulary, store.model.width)
    segments = _segments(store, facts)
    sides: Sides | None = None if store.model.tied else "input"  # an untied head: another weight
    with lock(store.root / "sketches.lock", 0, "sketching"):
        remove_orphans(store)
        before = [_said(_folder(store, path)) for _, path, _ in segments]
        size = size or next((said["size"] for said in before if said), SIZE)
        projection = Projection(size, seed, (rows, columns))
        missing = [
            each
            for each, said in zip(segments, before, strict=True)
            if not _is_current(said, projection, each[2])
        ]
        for done, (number, path, digest) in enumerate(missing):
            progress(done, len(missing))
            segment = segment_path(store.root, path)
            places = store.rows(
                """SELECT row_start, "rows", token_start, tail_row FROM exposures
                   WHERE segment_id = ? ORDER BY row_start""",
                [number],
            )
            found = projection.of_segment(segment, [Place(*p) for p in places], sides)
            starts = [start for start, *_ in places]
            _write(_folder(store, path), found, _facts(projection, digest), starts)
        progress(len(missing), len(missing))
    return len(missing), len(segments)


def open_sketches(store: Store, run: Mapping[str, Any]) -> Sketches:
    """All sketches of a run, in the order of segments and of rows in them.

    Raises :class:`InfluenceError` unless every segment has one, as it is now and drawn alike.
    """
    segments, kept = _segments(store, run), list[tuple[Tensor | None, dict[str, Any]]]()
    for _, path, _ in segments:  # one after another: there may be more than files can be open
        array = _opened(_folder(store, path))
        kept.append((None, {}) if array is None else (_rows(array), array.attributes))
    projection = _drawn_alike(store, run, segments, [said for _, said in kept])
    lengths = torch.tensor([length for _, said in kept for length in said["lengths"]])
    return Sketches(projection, [block for block, _ in kept if block is not None], lengths)


def remove_orphans(store: Store) -> None:
    """Remove sketches of segments that are no more: what is erased is to be gone from here too."""
    kept = {_folder(store, path) for (path,) in store.rows("SELECT path FROM segments")}
    for folder in (store.root / SKETCHES).glob("r[0-9]*/*"):
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
    segments = _segments(store, run)
    _drawn_alike(store, run, segments, [_said(_folder(store, path)) for _, path, _ in segments])
    return NOMINATED


# -- inside ----------------------------------------------------------------------------------


def _drawn_alike(
    store: Store,
    run: Mapping[str, Any],
    segments: Sequence[Segment],
    kept: Sequence[Mapping[str, Any]],
) -> Projection:
    """What drew the sketches that say this of themselves, one for each segment of a run.

    Raises :class:`InfluenceError` as :func:`open_sketches`.
    """
    size, seed = next(((said["size"], said["seed"]) for said in kept if said), (0, 0))
    projection = Projection(size, seed, (store.model.vocabulary, store.model.width))
    stale = sum(
        not _is_current(said, projection, digest)
        for (_, _, digest), said in zip(segments, kept, strict=True)
    )
    if stale or not segments:
        raise InfluenceError(
            f"{stale} of the {len(segments)} segments of {run['name']} have no sketches, or those "
            "of other contents or another size; make them with "
            f"`gradstore sketch -s {store.root} --run {run['name']}`"
        )
    return projection


def _segments(store: Store, run: Mapping[str, Any]) -> list[Segment]:
    """Number, path and digest of the segments that hold a run's gradients."""
    return store.rows(
        """SELECT segment_id, path, digest FROM segments
           WHERE run_id = ? AND kind = 'gradients' ORDER BY segment_id""",
        [run["run_id"]],
    )


def _folder(store: Store, path: str) -> Path:
    """Where the sketches of the segment at a path lie: r0/000001 beside that of ``segments``."""
    beside = segment_path(store.root, path).relative_to(store.root / "segments")
    return unlinked(store.root / SKETCHES / beside, store.root)


def _opened(folder: Path) -> ZarrArray | SealedArray | None:
    """The sketches in a folder, not read yet; sealed ones are under the keys of their segment.

    Damaged ones, and those of another scheme, are as good as none: they can be made again.
    """
    try:
        array = open_array(folder.parent, folder.name, keys_at(_segment(folder)), "sketch")
        if not isinstance(array, SealedArray):
            array.raw_file()
    except StoreDamaged:
        return None
    return array if array.attributes.get("scheme") == SCHEME else None


def _said(folder: Path) -> dict[str, Any]:
    """What the sketches in a folder say of themselves; empty where there are none."""
    array = _opened(folder)
    return {} if array is None else array.attributes


def _rows(array: ZarrArray | SealedArray) -> Float[Tensor, "rows m"]:
    """Sketches mapped into memory without an open file; sealed ones are read into it."""
    if isinstance(array, SealedArray):
        try:
            return torch.from_numpy(array.read())
        except StoreDamaged as error:
            raise InfluenceError(
                f"sketches cannot be read: {error}. They can also be made again: remove the "
                "store's folder `sketches` and run `gradstore sketch`"
            ) from error
    size = array.shape[0] * array.shape[1]
    file = torch.from_file(str(array.raw_file()), size=size, dtype=torch.float16)
    return file.view(array.shape)


def _segment(folder: Path) -> Path:
    """The segment that the sketches in a folder are of."""
    return folder.parents[2] / "segments" / folder.parent.name / folder.name


def _facts(projection: Projection, digest: str) -> dict[str, Any]:
    """What sketches must say of themselves to be used for a segment of this digest."""
    size, seed, shape = projection.size, projection.seed, list(projection.shape)
    return {"scheme": SCHEME, "size": size, "seed": seed, "gradient": shape, "segment": digest}


def _is_current(said: Mapping[str, Any], projection: Projection, digest: str) -> bool:
    return _facts(projection, digest).items() <= said.items()


def _write(folder: Path, found: Tensor, facts: Mapping[str, Any], starts: Sequence[int]) -> None:
    """Put an array of sketches in place of an older one; a crash leaves none or a whole one.

    ``starts`` says of each where its record's rows start in the segment.
    """
    lengths = found.norm(dim=1)
    units = (found / lengths.clamp(min=1e-30)[:, None]).half().numpy()
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(temporary):
        said = {**facts, "lengths": lengths.tolist()}
        if (keys := keys_at(_segment(folder))) is None:
            files = write_array(temporary, units, "raw", said)
        else:  # each under its record's key, so that shredding that reaches it too
            spans = [(slot, 1) for slot in slots_at(_segment(folder), keys, starts)]
            files = write_sealed(temporary, "sketch", units, "raw", said, keys, spans)
        write_durably(temporary / MANIFEST, [json.dumps({"files": files}).encode()])
        sync_tree(temporary)
        shutil.rmtree(folder, ignore_errors=True)
    replace_durably(temporary, folder)
