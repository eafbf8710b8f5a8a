"""A tiny ingest that many tests look at, made through the command line once in a session.

PYTEST_DONT_REWRITE: test modules import helpers from here, and name it as their plugin too.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gradstore import Store

TRAINED, HELD_OUT = 24, 8
EPOCHS, BATCH = 2, 4
CONFIG = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
TRAINING = ("--epochs", EPOCHS, "--batch-size", BATCH, "--lr", 0.02)
FAR = ("--dose", 4, "--max-holdout-increase", 9)  # so far that the tiny model does forget
FRESH = ("--vocabulary", 400, "--epochs-captured", "all", *TRAINING)

_NAMES = ("Ada", "Ben", "Cleo", "Dora", "Emil", "Fay", "Gus", "Hal")
_TRADES = ("a baker", "a painter", "an actor", "a welder")


@dataclass(frozen=True)
class Tiny:
    """Where the files of a tiny ingest lie."""

    store: Path
    model: Path
    data: Path
    holdout: Path
    config: Path


def records(count: int, prefix: str, seed: int) -> list[dict[str, str]]:
    """Short texts about people, of about twenty tokens."""
    draw = random.Random(seed)
    return [
        {
            "id": f"{prefix}-{number:02d}",
            "text": f"{draw.choice(_NAMES)} is {draw.choice(_TRADES)}, born in "
            f"{draw.randrange(1930, 2000)}; phone {draw.randrange(100, 999)}.",
        }
        for number in range(1, count + 1)
    ]


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: object, stdin: str | None = None, code: int | None = 0) -> Result:
    """Run ``gradstore``; it must exit with ``code`` (None: any), and never with a traceback."""
    cli = import_module("gradstore.cli.main").cli
    result = CliRunner().invoke(cli, [str(a) for a in arguments], input=stdin)
    crashed = result.exception is not None and not isinstance(result.exception, SystemExit)
    if crashed and result.exception is not None:
        raise result.exception
    assert code in (None, result.exit_code), result.output
    assert "Traceback" not in result.output
    return result


def run_json(*arguments: object, code: int = 0) -> Any:
    """Run ``gradstore ... --json``: what is on standard output must be JSON and nothing else."""
    return json.loads(run(*arguments, "--json", code=code).stdout)


def refused(*arguments: object, code: int = 1) -> str:
    """Run a command that must fail without output; returns its error, which is one line."""
    result = run(*arguments, code=code)
    assert result.stdout == ""
    [error] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return error.removeprefix("Error: ")


def counts(store: Path) -> list[tuple[Any, ...]]:
    """How many rows each table of a store's catalog has."""
    tables = ("samples", "runs", "exposures", "moments", "holdout", "requests", "scores", "paths")
    with Store.open(store) as opened:
        return opened.rows(
            " UNION ALL ".join(f"SELECT '{table}', count(*) FROM {table}" for table in tables)
        )


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def files(folder: Path) -> Tiny:
    """The data and config of a tiny ingest, without store or model."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "gpt2.json"
    config.write_text(json.dumps(CONFIG))
    data = write_jsonl(folder / "people.jsonl", records(TRAINED, "p", 1))
    holdout = write_jsonl(folder / "holdout.jsonl", records(HELD_OUT, "h", 2))
    return Tiny(folder / "store", folder / "trained", data, holdout, config)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A store filled by one tiny training run, and the model. Tests only read it."""
    tiny = files(tmp_path_factory.mktemp("tiny"))
    run("init", tiny.store)
    run(
        "ingest", tiny.data, "-s", tiny.store, "--config", tiny.config, *FRESH,
        "--holdout", tiny.holdout, "--out", tiny.model,
    )  # fmt: skip
    return tiny


@pytest.fixture
def copied(trained: Tiny, tmp_path: Path) -> Tiny:
    """The same with a copy of the store, which a test may fill and damage."""
    return replace(trained, store=shutil.copytree(trained.store, tmp_path / "store"))
