"""Writers that are killed, and what they leave: for tests, and for benchmarks/crash.py.

PYTEST_DONT_REWRITE: a benchmark imports this without pytest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradstore import Store
from gradstore.store.record import Record


class Victims:
    """The process of crash_writer.py, which forks writers on one store and kills them."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("crash_writer.py")), str(root)]
        pipe, one = subprocess.PIPE, {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=os.environ | one
        )

    def run(self, **order: Any) -> set[str]:
        """Let writers work until they are killed; returns the ids that they acknowledged."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        acknowledged: set[str] = set()
        for line in self._process.stdout:
            word, *rest = line.split()
            if word == "dead":
                assert {int(code) for code in rest} == {-signal.SIGKILL}, "a writer failed"
                return acknowledged
            acknowledged.update(rest)
        raise AssertionError("the process that forks the writers is gone")

    def __enter__(self) -> Victims:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def everything(store: Store) -> dict[str, Record]:
    """All records by id. The catalog must be sound: numbered without gaps, no exposure twice."""
    samples = store.rows("SELECT sample_id, id FROM samples ORDER BY rowid")
    assert [n for n, _ in samples] == list(range(1, len(samples) + 1))
    found = list(store.records([n for n, _ in samples], 1))
    assert [one.exposure.id for one in found] == [id for _, id in samples]
    return {one.exposure.id: one for one in found}


def left_behind(store: Store) -> Iterator[str]:
    """How far the killed writers had come, as the disk shows it."""
    if any(store.root.rglob("segments/r*/.tmp-*")):
        yield "writing a segment"
    if any(store.root.rglob("published/.tmp-*")):
        yield "publishing"
    if (store.root / "catalog.duckdb.wal").exists():
        yield "committing"
    if not store.is_current():
        yield "not yet visible"
    store.refresh()
