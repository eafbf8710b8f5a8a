"""Where products are made: a GPU if there is one."""

from __future__ import annotations

import torch

from gradstore.errors import SettingsError


def device_of(asked: str | None) -> str:
    """The device asked for, or else a GPU of CUDA's kind, or else the processor.

    Raises :class:`SettingsError` for what this machine has not, or PyTorch cannot use.
    """
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=asked).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).splitlines()[0]
        raise SettingsError(
            f"--device {asked} cannot be used: {said.rstrip('.')}; leave it out, or give cpu"
        ) from error
    return asked
