"""Where segments are scored: here, one after another, or by the workers of a Dask cluster."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from gradstore.errors import InfluenceError

Executor = Callable[..., Any]
_FORMS = "here, dask (threads of this process), or dask:ADDRESS of a scheduler"
SECONDS = 10  # to wait for a scheduler
_LOCAL: dict[str, Any] = {"processes": False, "dashboard_address": None}


@contextmanager
def executor_of(text: str) -> Iterator[Executor]:
    """An executor for :func:`gradstore.influence.top.influences` that lives inside ``with``.

    ``here`` is the built-in ``map``; ``dask`` spreads segments over threads, ``dask:ADDRESS`` over
    the workers of a running scheduler, which have gradstore installed and see the store at the same
    path or, where its segments lie elsewhere, reach their URL. Raises ``ValueError`` for another
    text and :class:`InfluenceError` where Dask is missing or does not answer.
    """
    address = parse_executor(text)
    if text == "here":
        yield map
        return
    try:
        from distributed import Client
    except ImportError:
        raise InfluenceError(
            "Dask is not installed; install it with `pip install 'gradstore[dask]'`, or leave "
            "--executor out"
        ) from None
    try:
        client = Client(address, timeout=SECONDS) if address else Client(**_LOCAL)
    except OSError as error:
        raise InfluenceError(
            f"no Dask scheduler answers at {address} ({error}); start one with `dask scheduler`"
        ) from error
    with client:
        yield partial(_over, client)


def parse_executor(text: str) -> str | None:
    """The scheduler's address in ``dask:ADDRESS``, or None; ``ValueError`` for what is none."""
    if not (found := re.fullmatch(r"here|dask(?::(.+))?", text)):
        raise ValueError(f"{text!r} names no executor; expected {_FORMS}")
    return found[1]


def _over(client: Any, function: Callable[..., Any], *columns: Sequence[Any]) -> list[Any]:
    """``map`` on a cluster; what the function holds, such as a query, is sent once."""
    sent = client.scatter(function, broadcast=True, hash=False)
    rows = list(zip(*columns, strict=True))
    futures = client.map(_call, [sent] * len(rows), rows, pure=False)
    found: list[Any] = client.gather(futures)
    return found


def _call(function: Callable[..., Any], row: Sequence[Any]) -> Any:
    return function(*row)
