"""Is a receipt true? The new checkpoint is made again from the old one and compared."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gradstore.capture.layers import parameter
from gradstore.errors import ModelError, StoreDamaged
from gradstore.identity import digest_checkpoint
from gradstore.store.files import sha256_of
from gradstore.store.store import Store
from gradstore.training.ingest import save_checkpoint
from gradstore.training.model import load_model
from gradstore.unlearn import receipt as receipts
from gradstore.unlearn import signature
from gradstore.unlearn.update import add


@dataclass(frozen=True)
class Check:
    """One thing that was checked, and what was found; ``passed`` None: there is no way to."""

    check: str
    passed: bool | None
    found: str


def verify(
    store: Store,
    number: int,
    model_in: Path | None = None,
    model_out: Path | None = None,
    public_key: Path | None = None,
) -> list[Check]:
    """Check a request's receipt; it holds if no check has failed.

    ``document``: it is what the catalog says was written. ``chain``: so are all others, each naming
    the one before it. ``update``, ``model before`` and ``model after``: the files have the digests
    in the receipt. ``recomputed``: so has the old checkpoint with the stored update added, written
    to a temporary folder; a replay has no update and is not tried. ``signature``, with a public
    key. The models' paths are the catalog's unless given; a file that is gone fails its check.
    Raises :class:`IdError` if the request has no receipt, :class:`StoreDamaged` if its file is
    none, :class:`ForgetError` if the key is none.
    """
    receipt = receipts.read(store, number)
    known = receipts.digests(store)
    [paths] = store.table("SELECT model_in, model_out FROM requests WHERE request_id = ?", [number])
    before, after = model_in or Path(paths["model_in"]), model_out or Path(paths["model_out"])
    try:
        update = receipt["update"]
        dose = None if update is None else float(receipt["method"]["dose"])
        expected_before, expected_after = receipt["model"]["before"], receipt["model"]["after"]
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise StoreDamaged(
            f"{receipts.path_of(store, number)} is no receipt ({error}); restore it from a backup"
        ) from error
    checks = [
        _compare("document", receipts.digest_of(receipt), known[number]),
        _chain(store, known),
    ]
    if update is not None:
        checks.append(_compare("update", _digest_of_update(store, number), update))
    if re.fullmatch("[0-9a-f]{64}", str(expected_before)):  # else the name of a model on the hub
        checks.append(_model("model before", before, expected_before, "--model-in"))
    if dose is None:
        checks.append(
            Check("recomputed", None, "not tried (replay): `forget --exact` trains again")
        )
    elif all(check.passed for check in checks if check.check in ("update", "model before")):
        digest = _recompute(before, receipts.path_of(store, number, "safetensors"), dose)
        checks.append(_compare("recomputed", digest, expected_after))
    else:
        checks.append(Check("recomputed", False, "not tried: its parts are not the receipt's"))
    checks.append(_model("model after", after, expected_after, "--model-out"))
    if public_key is not None:
        good, said = signature.check(store, number, receipt, public_key)
        checks.append(Check("signature", good, said))
    return checks


def _compare(check: str, found: str | None, expected: object) -> Check:
    if found == expected:
        return Check(check, True, f"SHA-256 {found}")
    return Check(check, False, f"SHA-256 {found or 'of nothing: the file is gone'}, not {expected}")


def _chain(store: Store, known: dict[int, str]) -> Check:
    """Each receipt is the one whose digest the catalog and the next receipt name."""
    previous = None
    for number, digest in known.items():
        try:
            receipt = receipts.read(store, number)
        except StoreDamaged as error:
            return Check("chain", False, str(error))
        if receipts.digest_of(receipt) != digest:
            return Check("chain", False, f"receipt {number} has been changed")
        if (named := receipt["audit"]["previous"]) != previous:
            return Check("chain", False, f"receipt {number} follows {named}, not {previous}")
        previous = digest
    return Check("chain", True, f"{len(known)} in order, the last {previous}")


def _digest_of_update(store: Store, number: int) -> str | None:
    path = receipts.path_of(store, number, "safetensors")
    return sha256_of(path) if path.exists() else None


def _model(check: str, model: Path, expected: object, option: str) -> Check:
    try:
        return _compare(check, digest_checkpoint(model), expected)
    except ModelError:  # deleted, as it should be once it has been replaced, or moved
        return Check(check, False, f"no weights in {model}; if they were moved: {option} DIR")


def _recompute(model: Path, update: Path, dose: float) -> str:
    network: Any = load_model(model)
    add(partial(parameter, network), update, dose)
    with tempfile.TemporaryDirectory() as folder:
        return save_checkpoint(network, None, Path(folder))
