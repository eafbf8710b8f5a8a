"""A store with three receipts, and what the tests of receipts ask of it.

PYTEST_DONT_REWRITE: test modules import helpers from here, and name it as their plugin too.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tiny import FAR, Tiny, run, run_json

EVERYTHING = ["document", "chain", "update", "model before", "recomputed", "model after"]


@pytest.fixture(scope="session")
def three(trained: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A store with three receipts, whose folder also holds their checkpoints out-1 to out-3."""
    folder = tmp_path_factory.mktemp("three")
    tiny = replace(trained, store=shutil.copytree(trained.store, folder / "store"))
    shutil.copytree(trained.model, folder / "trained")
    model = folder / "trained"
    requests = [["p-07", "p-02"], ["p-03"], ["p-04", "--direction", "raw", "--dose", "target:8"]]
    for number, request in enumerate(requests, 1):
        out, options = folder / f"out-{number}", [*FAR, *request]
        run("forget", *options, "-s", tiny.store, "--model", model, "--out", out, code=None)
        model = out
    return tiny


@pytest.fixture
def receipted(three: Tiny, tmp_path: Path) -> Path:
    """A copy of it, which a test may damage: the folder that holds ``store``."""
    return shutil.copytree(three.store.parent, tmp_path / "copy")


def validator() -> Draft202012Validator:
    schema = json.loads((files("gradstore.schemas") / "receipt.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def document(folder: Path, number: int) -> dict[str, Any]:
    shown = run("receipt", "show", number, "-s", folder / "store").stdout
    found: dict[str, Any] = json.loads(shown)
    return found


def verified(folder: Path, number: int, *options: object, code: int = 0) -> dict[str, Any]:
    """What ``receipt verify`` found, by check, with the models in ``folder``."""
    before = folder / ("trained" if number == 1 else f"out-{number - 1}")
    models = ("--model-in", before, "--model-out", folder / f"out-{number}")
    checks = run_json(
        "receipt", "verify", number, "-s", folder / "store", *models, *options, code=code
    )
    return {check["check"]: check["passed"] for check in checks}


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def change(folder: Path, number: int, what: str) -> None:
    """Change a receipt's dose, or a held-out loss in its last bits."""
    path = folder / "store" / "receipts" / f"{number:04d}.json"
    receipt = json.loads(path.read_bytes())
    if what == "dose":
        receipt["method"]["dose"] *= 1 + 2**-20
    else:
        receipt["metrics"][1]["after"] *= 1 + 2**-50
    path.write_text(json.dumps(receipt))
