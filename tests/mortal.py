"""A process that is killed at a file operation, played within this one.

PYTEST_DONT_REWRITE: test modules import helpers from here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from gradstore.store import database

CALLS = ("fsync", "mkdir", "replace", "rmdir", "unlink")  # of os
STATEMENTS = ("BEGIN", "COMMIT", "CHECKPOINT")  # of DuckDB
MOMENTS = CALLS + STATEMENTS


class Killed(BaseException):
    """Stands for the end of the process."""


class Mortal:
    """Dies before the call of that ``number`` of one of :data:`MOMENTS`; counts from 1.

    ``heir`` is then a copy of ``root`` as a killed process leaves it, unfinished files and DuckDB's
    log included. What unwinds afterwards does so in ``root``, at which nobody looks any more.
    """

    def __init__(self, root: Path, heir: Path, moment: str = "", number: int = 0) -> None:
        self._root, self._heir, self._moment, self._left = root, heir, moment, number
        self.dead = False

    def step(self, name: str) -> None:
        self._left -= name == self._moment
        if self._left == 0 and name == self._moment and not self.dead:
            self.dead = True
            shutil.copytree(self._root, self._heir)
            raise Killed

    @contextmanager
    def living(self) -> Iterator[None]:
        """The time in which it may die. Nothing waits for the disk: no power is lost here."""
        opened = database.open_file

        @contextmanager
        def open_file(path: Path, *, read_only: bool) -> Iterator[Any]:
            with opened(path, read_only=read_only) as connection:
                yield _Connection(connection, self.step)

        def open_any(path: Path, *, read_only: bool) -> Any:
            return opened(path, read_only=True) if read_only else open_file(path, read_only=False)

        with ExitStack() as patched:
            for name in CALLS:
                patched.enter_context(mock.patch.object(os, name, self._counting(name)))
            patched.enter_context(mock.patch.object(database, "open_file", open_any))
            yield

    def _counting(self, name: str) -> Callable[..., Any]:
        function = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.step(name)
            return None if name == "fsync" else function(*arguments, **options)

        return call


class _Connection:
    """A connection to DuckDB that tells of the statements that it runs."""

    def __init__(self, connection: Any, step: Callable[[str], None]) -> None:
        self._connection, self._step = connection, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, sql: str, *rest: Any) -> Any:
        self._step(sql)
        return self._connection.execute(sql, *rest)
