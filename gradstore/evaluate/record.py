"""An evaluation's rows in the catalog."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradstore.evaluate.figures import NAMES, Figure, Measured, Values
from gradstore.store import catalog
from gradstore.store.store import Store


def record(
    store: Store, facts: Mapping[str, Any], measured: Measured, found: Sequence[Figure]
) -> int:
    """Enter an evaluation in one transaction; returns its number."""
    rows = _of_samples(measured) + _of_many(measured, found)
    with store.transaction() as connection:
        catalog.check_there(connection, [r["sample_id"] for r in rows if r.get("sample_id")])
        [(number,)] = connection.execute(
            "SELECT coalesce(max(evaluation_id), 0) + 1 FROM evaluations"
        ).fetchall()
        row = {"evaluation_id": number, "created_at": catalog.now(), **facts}
        catalog.insert(connection, "evaluations", {k: [v] for k, v in row.items() if v is not None})
        table: dict[str, list[Any]] = {"evaluation_id": [number] * len(rows)}
        ends = [f"{name}_{end}" for name in NAMES for end in ("low", "high")]
        for column in ("sample_id", "role", "metric", "samples", *NAMES, *ends):
            table[column] = [row.get(column) for row in rows]
        catalog.insert(connection, "measurements", table)
    return int(number)


def _of_samples(measured: Measured) -> list[dict[str, Any]]:
    values: dict[str, Values] = {name: dict(of) for name, of in measured.values.items()}
    for (one, other), divergence in measured.apart.items():
        if one == "reference" and other in values:
            kl = np.array([float(each.mean()) for each in divergence])
            values[other]["kl_to_reference"] = kl
    rows = []
    for metric in values["model"]:
        for at, (i, role) in enumerate(measured.audience.members):
            by = {name: float(of[metric][at]) for name, of in values.items() if metric in of}
            if not math.isnan(by["model"]):
                sample = measured.audience.numbers[i]
                rows.append({"sample_id": sample, "role": role, "metric": metric, **by})
    return rows


def _of_many(measured: Measured, found: Sequence[Figure]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for figure in found:
        row: dict[str, Any] = {"role": figure.role, "metric": figure.metric}
        row["samples"] = figure.samples
        for name, of in figure.values.items():
            row |= zip((name, f"{name}_low", f"{name}_high"), of.as_tuple(), strict=True)
        rows.append(row)
    for step in range(len(measured.curves["model"][0]) if measured.curves else 0):
        row = {"role": "forget", "metric": f"relearned_loss_{step}"}
        for name, curves in measured.curves.items():
            at = [curve[step] for curve in curves]
            row |= {name: float(np.mean(at)), f"{name}_low": min(at), f"{name}_high": max(at)}
        rows.append(row)
    return rows
