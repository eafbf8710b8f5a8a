"""Where products are made: on a GPU if there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gradstore.errors import InfluenceError, SettingsError


def device_of(asked: str | None) -> str:
    """The device asked for, or else a GPU that CUDA or ROCm reaches, or else the processor.

    Raises :class:`SettingsError` for what this machine has not, and for other kinds of device.
    """
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    known = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if asked == "cuda" and len(known) > 1:
        return asked
    if asked not in known:
        raise SettingsError(
            f"--device {asked} is not on this machine, or PyTorch cannot use it; expected "
            + " or ".join(known)
        )
    return asked


@contextmanager
def room_on(device: str) -> Iterator[None]:
    """Raises :class:`InfluenceError` where what is done takes more memory than a GPU has."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InfluenceError(
            f"{device} has too little memory free: give --device cpu, or wait until it has more"
        ) from error
