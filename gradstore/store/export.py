"""What a store holds, as files that other tools open: Parquet, safetensors, NumPy's npz.

A file is written beside its place and renamed, so it is whole or not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save_file
from torch import Tensor

from gradstore.errors import IdError, StoreExists
from gradstore.store import catalog
from gradstore.store.files import writing
from gradstore.store.format import ModelIdentity
from gradstore.store.record import Record
from gradstore.store.store import Store

FORMATS = ("safetensors", "npz")


def export_tables(store: Store, folder: Path, *, force: bool = False) -> dict[Path, int]:
    """Write every table and view of the catalog as ``folder/<name>.parquet``.

    Comments on columns go along as metadata of the fields. Returns the number of rows of each
    file. Raises :class:`StoreExists` if one of them is there, unless ``force``.
    """
    tables, columns = store.schema()
    names = [table["name"] for table in tables if table["kind"] != "function"]
    comments = {(column["table"], column["column"]): column["comment"] for column in columns}
    paths = {name: folder / f"{name}.parquet" for name in names}
    for path in paths.values():
        _refuse(path, force)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    with catalog.reader(store.root) as connection:
        for name, path in paths.items():
            table = connection.sql(f"SELECT * FROM {name}").to_arrow_table()
            fields = [
                field.with_metadata({"comment": comments[name, field.name]})
                for field in table.schema
            ]
            table = table.cast(pyarrow.schema(fields))
            _write(path, partial(pyarrow.parquet.write_table, table))
            rows[path] = table.num_rows
    return rows


def export_gradients(
    store: Store,
    ids: Sequence[str],
    path: Path,
    *,
    run: str | int | None = None,
    epoch: int | None = None,
    format: str = "safetensors",
    dense: bool = False,
    force: bool = False,
) -> list[dict[str, Any]]:
    """Write the records of samples, all that a run stored or those of one epoch, into one file.

    Record n has the arrays ``n/tokens``, ``n/scored``, ``n/D`` and, with an output side, ``n/H``,
    ``n/R_index``, ``n/R_value``, ``n/R_label``, ``n/tail_mass`` and ``n/tail``, with layers
    also ``n/layers/<name>/A`` and ``B`` (shapes as in :class:`Record`, :class:`OutputSide` and
    :class:`Factors`). ``dense`` adds the gradients they stand for, float32, as
    ``n/dense/embedding`` (V, d), ``n/dense/<layer>``, ``n/dense/position`` and ``n/dense/head``
    where the model has
    them. The names are numbers because an id may be any text; the ids are in the metadata, JSON
    under ``gradstore`` (in a npz, an array of one string): for each record what ``exposures`` says
    of it, and the model. ``safetensors`` keeps the types of the store, ``npz`` widens bfloat16,
    which NumPy lacks, to float32.

    Returns the metadata of each record. Raises :class:`IdError` for an unknown id or run, or an id
    without a stored gradient there, and :class:`StoreExists` if the file is there, unless
    ``force``.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    _refuse(path, force)
    facts, numbers = store.run(run), store.resolve(ids)
    arrays: dict[str, Tensor] = {}
    described: list[dict[str, Any]] = []
    for record in store.records(list(numbers.values()), facts["run_id"]):
        if epoch is not None and record.exposure.epoch != epoch:
            continue
        for name, tensor in _arrays(record, store.model, dense).items():
            arrays[f"{len(described)}/{name}"] = tensor
        described.append(asdict(record.exposure) | {"run": facts["name"]})
    if without := numbers.keys() - {one["id"] for one in described}:
        when = "" if epoch is None else f" of epoch {epoch}"
        raise IdError(
            f"{facts['name']} stored no gradient{when} of {', '.join(sorted(without))}; "
            f"see `gradstore show {min(without)}`"
        )
    metadata = {"records": described, "model": asdict(store.model)}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    save = _save_safetensors if format == "safetensors" else _save_npz
    _write(path, lambda to: save(to, arrays, json.dumps(metadata)))
    return described


# -- inside ----------------------------------------------------------------------------------


def _arrays(record: Record, model: ModelIdentity, dense: bool) -> dict[str, Tensor]:
    arrays = {"tokens": record.tokens, "scored": record.scored, "D": record.D}
    if (side := record.output) is not None:
        arrays |= {
            "H": side.H,
            "R_index": side.index,
            "R_value": side.value,
            "R_label": side.label,
            "tail_mass": side.tail_mass,
            "tail": side.tail,
        }
    for layer, factors in record.layers.items():
        arrays |= {f"layers/{layer}/A": factors.A, f"layers/{layer}/B": factors.B}
    if dense:
        layers = ["embedding", *record.layers]
        if record.exposure.position_start is not None and model.positions is not None:
            layers.append("position")
        if record.output is not None and not model.tied:
            layers.append("head")
        for layer in layers:
            arrays[f"dense/{layer}"] = record.gradient(model, layer).dense()
    return arrays


def _save_safetensors(path: Path, arrays: Mapping[str, Tensor], metadata: str) -> None:
    own = {name: tensor.clone() for name, tensor in arrays.items()}  # it refuses shared memory
    save_file(own, path, {"gradstore": metadata})


def _save_npz(path: Path, arrays: Mapping[str, Tensor], metadata: str) -> None:
    held = {
        name: (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
        for name, tensor in arrays.items()
    }
    with open(path, "wb") as file:  # given a path, NumPy would append .npz to it
        np.savez(file, allow_pickle=False, gradstore=np.array(metadata), **held)


def _refuse(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise StoreExists(f"{path} exists; choose another place, or add --force to replace it")


def _write(path: Path, save: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    with writing(path):
        try:
            save(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
