"""Commands that read the catalog start without torch and zarr."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import Tiny

import gradstore

pytest_plugins = ["tiny"]

HEAVY = {"torch", "zarr", "transformers", "blosc", "numcodecs", "pyarrow", "numpy", "safetensors"}
PROGRAM = """
import json, sys
from importlib import import_module
try:
    import_module("gradstore.cli.main").cli.main(sys.argv[1:], prog_name="gradstore")
finally:
    sys.stderr.write("\\n" + json.dumps(sorted(sys.modules)))
"""


def imported_by(*arguments: str) -> set[str]:
    """Top-level modules that a process has imported when the command ends."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "80"}
    )
    assert done.stdout
    return {name.split(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["ingest", "--help"],
        ["forget", "-h"],
        ["match", "-h"],
        ["top", "-h"],
        ["sketch", "-h"],
        ["eval", "-h"],
        ["receipt", "-h"],
        ["receipt", "verify", "-h"],
        ["report", "-h"],
        ["erase", "-h"],
        ["audit", "-h"],
        ["compact", "-h"],
        ["export", "-h"],
        ["sql", "--help"],
    ],
    ids=" ".join,
)
def test_help_needs_nothing_heavy(arguments: list[str]) -> None:
    found = imported_by(*arguments)
    assert not found & (HEAVY | {"duckdb", "rich"})
    assert "click" in found


@pytest.mark.parametrize(
    "arguments",
    [
        ["list"],
        ["show", "p-01"],
        ["stats"],
        ["runs", "--csv"],
        ["schema", "samples"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_reading_the_catalog_needs_neither_torch_nor_zarr(
    arguments: list[str], trained: Tiny
) -> None:
    found = imported_by(*arguments, "--store", str(trained.store))
    assert not found & HEAVY
    assert "duckdb" in found


def test_the_package_itself_is_light_until_it_is_used() -> None:
    program = "import sys, gradstore; print(*sys.modules); gradstore.FactoredGradient"
    command = [sys.executable, "-c", program + "; print(*sys.modules)"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, after = (set(line.split()) for line in out.splitlines())
    assert not before & (HEAVY | {"duckdb", "click"})
    assert "torch" in after


def test_evaluating_knows_nothing_of_unlearning() -> None:
    folder = Path(gradstore.__file__).parent / "evaluate"
    modules = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert "loss.py" in modules
    assert [name for name, text in modules.items() if "gradstore.unlearn" in text] == []
