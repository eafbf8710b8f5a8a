"""A statement in a process of its own, which the kernel ends at its limits.

The author of a statement may be a stranger, and DuckDB neither counts nor interrupts all that a
statement makes it do. The kernel does: the default action of the alarm ends the process wherever it
is, and no allocation gets past the limit. Neither needs the process to cooperate, or this one to
live on.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from gradstore.errors import GradstoreError, QueryError

_NO_MEMORY = re.compile(
    "out of memory|MemoryError|bad_alloc|(can.?not|can't) allocate|memory allocation|map segment"
    "|thread creation failed|can't start new thread",
    re.I,
)


def answer(statement: str, store: Path, output: str, seconds: float, memory: int) -> None:
    """Print the rows of a statement within ``seconds`` and ``memory`` bytes.

    Memory is what the process can write to (``RLIMIT_DATA`` of Linux 4.7 and later): libraries that
    are mapped and address space that is only reserved do not count. Raises :class:`QueryError` with
    what the other process said, or which limit it met.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__, str(store), output, str(seconds), str(memory)],
        input=statement.encode(errors="replace"),
        stdout=_descriptor(sys.stdout),
        stderr=subprocess.PIPE,
        check=False,
    )
    sys.stdout.write((done.stdout or b"").decode())
    code, said = done.returncode, done.stderr.decode(errors="replace").strip()
    if code in (-signal.SIGALRM, -signal.SIGPROF):
        raise QueryError(
            f"the statement was stopped after {seconds:g} seconds; raise --timeout or ask for less"
        )
    if code == -signal.SIGPIPE:  # its reader had enough
        sys.exit(1)
    if code < 0 or (code and _NO_MEMORY.search(said)):
        raise QueryError(
            f"the statement needed more than {memory >> 20} MB of memory; raise --memory-limit or "
            "ask for less"
        )
    if code:
        raise QueryError(said)


def _descriptor(stream: IO[str]) -> int:
    """The file under a stream; a pipe where something else stands in its place."""
    try:
        stream.flush()
        return stream.fileno()
    except OSError:
        return subprocess.PIPE


def _apart(columns: Sequence[str]) -> list[str]:
    """Names of columns, with a number after a repeated one that no other column has."""
    names: list[str] = []
    taken, met = set(columns), Counter[str]()
    for name in columns:
        own = name
        while met[name] and own in taken:
            own = f"{name}_{met[name]}"
            met[name] += 1
        met[name] = met[name] or 1
        taken.add(own)
        names.append(own)
    return names


def main(arguments: Sequence[str]) -> None:
    """The other process: a store, the form of the output and the limits; SQL on standard input."""
    from gradstore.store import Store

    from .output import emit

    path, output, seconds, memory = arguments
    for name in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(name, signal.SIG_DFL)
    statement = sys.stdin.buffer.read().decode()
    try:
        store = Store.open(path)  # unlimited: it may have to recover what a crash left
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory), int(memory)))
        signal.setitimer(signal.ITIMER_REAL, float(seconds))
        columns, rows = store.query(statement)
        names = _apart(columns)
        signal.setitimer(signal.ITIMER_REAL, 0)  # a pager may take its time
        signal.setitimer(signal.ITIMER_PROF, float(seconds))
        emit([dict(zip(names, row, strict=True)) for row in rows], output, names)
        sys.stdout.flush()
        os._exit(0)  # nothing is left to do, and tidying up takes as long as starting
    except GradstoreError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
