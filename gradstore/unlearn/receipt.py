"""Receipts: what a forget request did, as a JSON document that can be shown and checked.

A receipt is made from the catalog's rows in the transaction that writes them, so that the two agree
and receipts follow each other in one chain. Its schema is ``schemas/receipt.schema.json``.

Ids appear as SHA-256 of the store's own identity (a random UUID) and the id. Who holds a receipt
but not the store cannot test a list of ids against it. Who has the store's ``gradstore.json`` can;
one id has the same hash in all receipts of a store; and how many ids there were is not hidden.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gradstore import __version__
from gradstore.errors import IdError, StoreDamaged
from gradstore.store import audit
from gradstore.store.catalog import Connection, insert
from gradstore.store.files import (
    RECEIPTS,
    canonical,
    make_folder,
    read_json,
    replace_durably,
    sync_folder,
    unlinked,
    write_durably,
    writing,
)
from gradstore.store.sealed_rows import seal_file
from gradstore.store.store import Store

FORMAT = 1
MOST_BYTES = 64 << 20


def hash_id(store: Store, sample: str) -> str:
    """The name of a sample in this store's receipts."""
    return audit.hash_of(store.format.store, sample)


def digest_of(receipt: dict[str, Any]) -> str:
    """SHA-256 of a receipt's canonical JSON: white space and the order of keys do not count."""
    return sha256(canonical(receipt)).hexdigest()


def path_of(store: Store, number: int, ending: str = "json") -> Path:
    """Where a request's receipt, its update (``safetensors``) or signature (``sig``) lies."""
    return unlinked(store.root / RECEIPTS / f"{number:04d}.{ending}", store.root)


def enter(store: Store, connection: Connection, number: int) -> None:
    """Enter a request, whose rows ``connection`` has just inserted, into the audit chain.

    Raises :class:`IdError` if one of its samples has been erased while it was carried out.
    """
    [(verdict, direction)] = connection.execute(
        "SELECT verdict, direction FROM requests WHERE request_id = ?", [number]
    ).fetchall()
    samples = connection.execute(
        """SELECT DISTINCT id, role FROM scores LEFT JOIN samples USING (sample_id)
           WHERE request_id = ? ORDER BY id""",
        [number],
    ).fetchall()
    if any(sample is None for sample, _ in samples):
        raise IdError("a sample was erased meanwhile: run the same command again")
    subject = " ".join(sorted(hash_id(store, s) for s, role in samples if role == "forget"))
    said = {"request": number, "verdict": verdict, "direction": direction}
    audit.append(connection, "forget", subject, said)


def write(store: Store, connection: Connection, number: int, update: bytes | None) -> None:
    """Write the receipt of a request, whose rows ``connection`` has just inserted, and its update.

    A replay has no update: training makes its checkpoint again. The files are durable before the
    transaction commits; one that does not commit leaves them to be replaced by the next request,
    which gets the same number. Raises :class:`StoreUnwritable`.
    """
    beside, update_digest = path_of(store, number, "safetensors"), None
    if update is not None:
        update = seal_file(store.root, beside.relative_to(store.root).as_posix(), update)
        update_digest = sha256(update).hexdigest()
    receipt = _build(store, connection, number, update_digest)
    folder = store.root / RECEIPTS
    with writing(folder):
        make_folder(folder)
        sync_folder(store.root)
        if update is None:
            beside.unlink(missing_ok=True)  # of a request that did not commit
    if update is not None:
        put(beside, update)
    put(path_of(store, number), json.dumps(receipt, indent=1, ensure_ascii=False).encode() + b"\n")
    row = {"request_id": number, "digest": digest_of(receipt), "update_digest": update_digest}
    insert(connection, "receipts", {name: [value] for name, value in row.items()})
    named = {"digest": row["digest"], "update": update_digest}
    audit.append(connection, "receipt", f"request:{number}", named)


_REFERENCES = {
    "asked": "asked target",
    "undo": "estimate from undoing the optimizer's steps",
    "held-out": "estimate from held-out",
}


def put(path: Path, content: bytes) -> None:
    """Put a file in place durably, over an older one. Raises :class:`StoreUnwritable`."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        write_durably(temporary, [content])
        replace_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def digests(store: Store) -> dict[int, str]:
    """The digest of every receipt that the catalog knows, by request, in the chain's order."""
    if not store.has("receipts"):
        return {}
    return dict(store.rows("SELECT request_id, digest FROM receipts ORDER BY request_id"))


def read(store: Store, number: int) -> dict[str, Any]:
    """The receipt of a request, as its file says.

    Raises :class:`IdError` if the request has none, :class:`StoreDamaged` if its file is gone or
    no JSON object.
    """
    known = digests(store)
    if number not in known:
        some = ", ".join(map(str, known)) or "none yet"
        raise IdError(
            f"request {number} has no receipt: only one that wrote a checkpoint has; "
            f'requests with one: {some} (`gradstore sql "FROM requests"` lists all)'
        )
    path = path_of(store, number)
    try:
        receipt = read_json(path, MOST_BYTES)
        canonical(receipt)  # NaN is no JSON
    except (OSError, ValueError) as error:
        raise StoreDamaged(f"{path} is no receipt ({error}); restore it from a backup") from error
    if not isinstance(receipt, dict):
        raise StoreDamaged(f"{path} is no receipt (no JSON object); restore it from a backup")
    return receipt


def _build(
    store: Store, connection: Connection, number: int, update_digest: str | None
) -> dict[str, Any]:
    cursor = connection.execute(
        """SELECT requests.*, runs.name AS run FROM requests JOIN runs USING (run_id)
           WHERE request_id = ?""",
        [number],
    )
    names = [column[0] for column in cursor.description or ()]
    request = dict(zip(names, cursor.fetchall()[0], strict=True))
    settings = json.loads(request["settings"])
    settings.pop("notes", None)  # talk, in which an id may be named
    scores = connection.execute(
        """SELECT id, role, metric, before, after FROM scores JOIN samples USING (sample_id)
           WHERE request_id = ? ORDER BY sample_id""",
        [number],
    ).fetchall()
    previous = connection.execute(
        "SELECT digest FROM receipts ORDER BY request_id DESC LIMIT 1"
    ).fetchall()
    target = None
    if request["target"] is not None:
        target = {
            "loss": _finite(request["target"]),
            "range": [_finite(request["target_low"]), _finite(request["target_high"])],
            "reference": _REFERENCES[request["target_source"]],
        }
    return {
        "format": FORMAT,
        "request": number,
        "time": request["created_at"].isoformat(timespec="seconds") + "Z",
        "ids": sorted({hash_id(store, sample) for sample, role, *_ in scores if role == "forget"}),
        "method": {
            "direction": request["direction"],
            "dose": request["dose"],
            "dose_asked": request["dose_asked"],
            "max_holdout_increase": request["max_holdout_increase"],
            "max_retained_increase": request["max_retained_increase"],
            "settings": settings,
        },
        "run": request["run"],
        "model": {"before": request["model_in_digest"], "after": request["model_out_digest"]},
        "metrics": [
            {
                "role": role,
                "metric": metric,
                **_summary([s[3:] for s in scores if s[1:3] == (role, metric)], settings["seed"]),
            }
            for role, metric in sorted({score[1:3] for score in scores})
        ],
        "target": target,
        "verdict": request["verdict"],
        "reason": request["reason"],
        "update": update_digest,
        "versions": {
            "gradstore": __version__,
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        "audit": {"previous": previous[0][0] if previous else None},
    }


def _summary(pairs: Sequence[tuple[float, float]], seed: int) -> dict[str, Any]:
    """Means of (before, after), and the 95 % bootstrap interval of the mean change.

    The interval is None for fewer than two samples: one says nothing about its spread.
    """
    import numpy as np  # here, as reading receipts needs none

    from gradstore.evaluate.statistics import estimate, mean

    before, after = np.array(pairs).T
    change, interval = after - before, None
    if len(pairs) > 1 and np.isfinite(change).all():
        _, *interval = estimate(mean, change, seed=seed).as_tuple()
    return {
        "count": len(pairs),
        "before": _finite(before.mean()),
        "after": _finite(after.mean()),
        "change": _finite(change.mean()),
        "interval": interval,
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
