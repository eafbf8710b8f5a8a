"""Where products are made: on a GPU if there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gradstore.errors import InfluenceError, SettingsError


def device_of(asked: str | None) -> str:
    """The device asked for, or else a GPU that CUDA or ROCm reaches, or else the processor.

    Raises :class:`SettingsError` for what this machine has not, and for other kinds.
    """
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise SettingsError(
            f"--device {asked} cannot be used: {said}; leave it out, or give cpu"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise SettingsError(f"--device is cpu, cuda or one of several, as cuda:1; not {asked}")
    return str(device)


@contextmanager
def room_on(device: str) -> Iterator[None]:
    """Raises :class:`InfluenceError` where what is done takes more memory than a GPU has."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InfluenceError(
            f"{device} has too little memory free: give --device cpu, or wait until it has more"
        ) from error
