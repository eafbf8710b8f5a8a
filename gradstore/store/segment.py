"""A segment: an immutable folder of Zarr arrays and a manifest that describes them.

Whatever training adds to a store is a segment (gradients, optimizer moments, held-out tokens), so
the catalog can be rebuilt from the manifests. A segment is written beside its final place, synced,
and renamed: from then on it is durable, and recovery enters it into the catalog if a crash came
between.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import StoreDamaged
from gradstore.store.arrays import ZarrArray, write_array
from gradstore.store.distant import Distant
from gradstore.store.files import (
    HERE,
    QUARANTINE,
    make_folder,
    replace_durably,
    sync_tree,
    write_durably,
    write_part,
    writing,
)
from gradstore.store.keys import FOLDER as KEYS
from gradstore.store.keys import Keys
from gradstore.store.manifest import MANIFEST
from gradstore.store.quantize import decode, encode, is_factor, lacking, parts_of
from gradstore.store.record import Exposure, Factors, LinearLayer, OutputSide, Record
from gradstore.store.remote import fetched
from gradstore.store.sealed import SealedArray, open_array, sealing_of
from gradstore.store.sealed_rows import keys_at

Arrays = Mapping[str, Tensor]
Tables = Mapping[str, Mapping[str, Sequence[Any]]]
_GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}


def write_segment(
    folder: Path,
    *,
    run: Mapping[str, Any],
    kind: str,
    profile: str,
    arrays: Arrays,
    tables: Tables,
    replaces: Sequence[str] = (),
    as_stored: bool = False,
    rounded: bool = False,
    digest: str = HERE,
) -> Path:
    """Write one segment below ``folder`` (a rank's); returns its path once it is durable.

    ``replaces`` are the paths (below the store) of segments whose place it takes: entering it into
    the catalog takes those out, in the same transaction. With ``as_stored`` the arrays are those of
    a segment's files, which no profile rounds again; ``rounded`` says that they were in eight bits
    before, whatever their profile. ``digest`` is for arrays that are not sealed.
    """
    number = _next_number(folder)
    temporary, final = folder / f".tmp-{number:06d}", folder / f"{number:06d}"
    with writing(temporary):
        make_folder(temporary)
        sealing = sealing_of(final, kind, tables)
        written: dict[str, Any] = {}
        for name, tensor in arrays.items():
            rounds = profile == "small" and not as_stored
            for part, (data, attributes) in _parts(name, tensor, rounds):
                at = temporary / part
                if sealing is None:
                    files = write_array(at, data, profile, attributes, digest)
                else:
                    files = sealing.write(at, part, data, profile, attributes)
                written |= {f"{part}/{file}": facts for file, facts in files.items()}
        group = json.dumps(_GROUP).encode()
        written["zarr.json"] = write_part(temporary / "zarr.json", [group], digest)
        exposures = tables.get("exposures", {"rows": []})
        manifest = {
            "run": dict(run),
            "segment": {
                "run_id": run["run_id"],
                "kind": kind,
                "profile": profile,
                "records": len(exposures["rows"]),
                "rows": sum(exposures["rows"]),
                "bytes": sum(facts["bytes"] for facts in written.values()),
                "written_at": datetime.now(UTC).replace(tzinfo=None).isoformat(),
                **({"replaces": list(replaces)} if replaces else {}),
            },
            "files": written,
            "tables": tables if sealing is None else sealing.tables(),
            **({"rounded": True} if rounded else {}),
        }
        text = json.dumps(manifest, default=str).encode()
        write_durably(temporary / MANIFEST, [text], sync=False)
        sync_tree(temporary)
    replace_durably(temporary, final)
    return final


def _next_number(folder: Path) -> int:
    """A number that no segment of this rank has, not even one that a repair has set aside.

    That one may be put back, and then removes whatever has the names that it replaces: these have
    lower numbers than its own.
    """
    root = folder.parents[1]
    aside = root / QUARANTINE / "segments" / folder.name
    keys = root / KEYS / folder.name  # keys of a segment that is gone may serve a backup of it
    # in this order, a segment that is set aside meanwhile is seen at least once
    places = (folder, aside, keys)
    names = [p.name.partition(".")[0] for place in places for p in place.glob("[0-9]*")]
    return max([int(name) for name in names if name.isdecimal()], default=0) + 1


def collect_garbage(folder: Path) -> None:
    """Remove what a killed writer of this rank left unfinished; finished segments are never it."""
    for unfinished in folder.glob(".tmp-*"):
        shutil.rmtree(unfinished)


def pack(records: Sequence[Record]) -> tuple[dict[str, Tensor], dict[str, dict[str, list[Any]]]]:
    """Arrays and catalog rows of a segment that holds ``records``."""
    names = [field.name for field in fields(Exposure)]
    table: dict[str, list[Any]] = {
        name: [getattr(record.exposure, name) for record in records] for name in names
    }
    lengths = [len(record.D) for record in records]
    table["rows"] = lengths
    table["row_start"] = [0, *np.cumsum(lengths[:-1]).tolist()][: len(records)]
    table["tokens"] = [len(record.tokens) for record in records]
    table["token_start"] = [0, *np.cumsum(table["tokens"][:-1]).tolist()][: len(records)]
    table["tail_row"] = [None] * len(records)
    arrays = {
        "tokens": narrow(torch.cat([record.tokens for record in records])),
        "scored": torch.cat([record.scored for record in records]).to(torch.uint8),
        "D": torch.cat([record.D for record in records]),
    }
    outputs = [record.output for record in records if record.output is not None]
    if outputs:
        tails: dict[int, tuple[int, Tensor]] = {}
        for output in outputs:
            tails.setdefault(id(output.tail), (len(tails), output.tail))
        table["tail_row"] = [tails[id(output.tail)][0] for output in outputs]
        arrays["H"] = torch.cat([output.H for output in outputs])
        arrays["R_index"] = narrow(torch.cat([output.index for output in outputs]))
        arrays["R_value"] = torch.cat(
            [torch.column_stack([o.label, o.tail_mass, o.value]) for o in outputs]
        )
        arrays["tail"] = torch.stack([tail for _, tail in tails.values()])
    for name in records[0].layers:
        arrays[f"{name}.A"] = torch.cat([record.layers[name].A for record in records])
        arrays[f"{name}.B"] = torch.cat([record.layers[name].B for record in records])
    return arrays, {"exposures": table}


class SegmentReader:
    """Reads single records, or whole arrays, of one segment; arrays are opened as needed."""

    @classmethod
    def at(cls, source: Source) -> SegmentReader:
        """One that is there already, or a new one."""
        return source if isinstance(source, SegmentReader) else cls(source)

    def __init__(self, path: Path | Distant) -> None:
        self._path = path if isinstance(path, Path) else path.here()
        self._arrays: dict[str, ZarrArray | SealedArray] = {}

    def tensor(
        self, name: str, start: int = 0, stop: int | None = None, *, copy: bool = True
    ) -> Tensor:
        """Rows of an array as a tensor of the type it was captured in.

        Those that are stored in eight bits are decoded. Without ``copy`` those that are not
        compressed may be mapped memory.
        """
        stored = self.stored(name, start, stop, copy=copy)
        if stored.dtype is not torch.int8:
            return stored
        step, others = parts_of(name)
        steps, wide = self.stored(step, start, stop), None
        if lacking(steps).any():
            wide = self.stored(others, start, stop)
        if steps.shape != stored.shape[:1] or (wide is not None and wide.shape != stored.shape):
            raise StoreDamaged(f"{self._path}: the parts of {name} do not fit each other")
        return decode(stored, steps, wide)

    def stored(
        self, name: str, start: int = 0, stop: int | None = None, *, copy: bool = True
    ) -> Tensor:
        """Rows of an array as they are stored: codes, not what they stand for."""
        array = self._array(name)
        rows = array.rows(start, len(array) if stop is None else stop, copy=copy)
        return _to_torch(rows, array.attributes)

    def rows(self, name: str) -> int:
        """How many rows an array has."""
        return len(self._array(name))

    def readable(self, name: str) -> Tensor:
        """A whole array as it is stored, with zeros for rows whose key was shredded."""
        array = self._array(name)
        return _to_torch(array.rows(0, len(array), lost=True), array.attributes)

    def close(self) -> None:
        """Let go of files; what was checked of them is kept, and reading opens them again."""
        for array in self._arrays.values():
            array.close()

    @cached_property
    def _keys(self) -> Keys | None:
        return keys_at(self._path)

    def _array(self, name: str) -> ZarrArray | SealedArray:
        if name not in self._arrays:
            _check_name(self._path, name)
            self._arrays[name] = self._open(name)
        return self._arrays[name]

    def _open(self, name: str) -> ZarrArray | SealedArray:
        while True:
            try:
                return open_array(self._path, name, self._keys)
            except StoreDamaged:
                if not fetched(self._path, name):
                    raise

    def tokens(self, start: int, count: int) -> Tensor:
        """(count,) token ids of one sample."""
        return self.tensor("tokens", start, start + count)

    def record(
        self, exposure: Exposure, place: Mapping[str, Any], layers: Sequence[LinearLayer] = ()
    ) -> Record:
        """The record at ``place``: row_start, rows, token_start and tail_row of the catalog.

        The factors of ``layers``, those its run captured, are read when they are asked for.
        """
        start, stop = place["row_start"], place["row_start"] + place["rows"]
        output = None
        if place["tail_row"] is not None:
            value = self.tensor("R_value", start, stop)
            output = OutputSide(
                H=self.tensor("H", start, stop),
                index=self.tensor("R_index", start, stop),
                label=value.select(1, 0),  # in half the time of an index
                tail_mass=value.select(1, 1),
                value=value[:, 2:],
                tail=self.tensor("tail", place["tail_row"], place["tail_row"] + 1).squeeze(0),
            )
        return Record(
            exposure=exposure,
            tokens=self.tokens(place["token_start"], place["rows"] + 1),
            scored=self.tensor("scored", start, stop).bool(),
            D=self.tensor("D", start, stop),
            output=output,
            layers=_StoredLayers(self._path, layers, start, stop) if layers else {},
        )


Source: TypeAlias = Path | Distant | SegmentReader  # where a segment can be read from


class _StoredLayers(Mapping[str, Factors]):
    """Reads a layer's factors each time it is asked for: there may be more layers than memory.

    Its files are closed again, since a process may not have many open.
    """

    def __init__(self, path: Path, layers: Sequence[LinearLayer], start: int, stop: int) -> None:
        self._path, self._start, self._stop = path, start, stop
        self._layers = {layer.layer: layer for layer in layers}

    def __getitem__(self, name: str) -> Factors:
        return Factors(self._layers[name], self._rows(f"{name}.A"), self._rows(f"{name}.B"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def _rows(self, name: str) -> Tensor:
        return SegmentReader(self._path).tensor(name, self._start, self._stop)


def _check_name(path: Path, name: str) -> None:
    """Refuse what is no name of an array: it may come from the catalog, and must be no path."""
    if "/" in name or "\0" in name or name in ("", ".", ".."):
        raise StoreDamaged(f"{path} has no array {name!r:.80}: that is a path, not a name")


def narrow(ids: Tensor) -> Tensor:
    """Token ids in the smallest type that a segment keeps them in."""
    return ids.to(torch.uint16 if not ids.numel() or ids.max() < 1 << 16 else torch.int32)


def _parts(
    name: str, tensor: Tensor, rounds: bool
) -> Iterator[tuple[str, tuple[np.ndarray, dict[str, Any]]]]:
    """What an array is stored as: itself, or of a rounded factor its codes, steps, wide rows."""
    tensor = tensor.detach().cpu()
    parts = {name: tensor}
    if rounds and is_factor(name) and tensor.dtype is torch.bfloat16:
        codes, steps, wide = encode(tensor)
        if lacking(steps).sum() <= len(steps) // 2:  # else more would be kept than before
            parts = dict(zip((name, *parts_of(name)), (codes, steps, wide), strict=True))
    for part, held in parts.items():
        yield part, _to_numpy(held)


def _to_numpy(tensor: Tensor) -> tuple[np.ndarray, dict[str, Any]]:
    if tensor.dtype is torch.bfloat16:  # Zarr has no bfloat16: the bits travel as uint16
        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16), {"dtype": "bfloat16"}
    return tensor.numpy(), {}


def _to_torch(data: np.ndarray, attributes: Mapping[str, Any]) -> Tensor:
    if attributes.get("dtype") == "bfloat16":
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    if data.dtype == np.uint16:  # an index below 65,536: torch computes little with uint16
        return torch.from_numpy(data.astype(np.int32))
    return torch.from_numpy(data)
