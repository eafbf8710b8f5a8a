"""What a request added to weights, kept so that it can be added again, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gradstore.capture.layers import matrix
from gradstore.errors import StoreDamaged
from gradstore.store.sealed_rows import open_file

_ROWS = ".rows"


def pack(updates: Mapping[str, Float[Tensor, "V d"]]) -> bytes:
    """A safetensors file of updates: each dense, or its rows that are not zero where it is smaller.

    ``embedding``, or another parameter's name, is (V, d) or (rows, d) in the update's own
    precision; ``embedding.rows``, only in the second form, the int64 indices of these rows. That of
    a weight of other than two dimensions is as :func:`~gradstore.capture.layers.matrix` has it.
    """
    stored = {}
    for name, given in updates.items():
        update = given.detach().cpu().contiguous()
        # -0.0 is kept as well: added to a weight of -0.0 it gives other bits than 0.0 does
        touched = (update.ne(0) | update.signbit()).any(dim=1).nonzero().squeeze(1)
        row_bytes = update.shape[1] * update.element_size()
        if len(touched) * (row_bytes + touched.element_size()) < len(update) * row_bytes:
            update, stored[name + _ROWS] = update[touched], touched
        stored[name] = update
    return save(stored)


def add(weight_of: Callable[[str], Tensor], path: Path, dose: float) -> None:
    """Add a stored update ``dose`` times to the weights that it names, in place.

    Each whole matrix is added in one call, as :class:`gradstore.unlearn.walk.Walk` does: the result
    has the same bits wherever PyTorch fuses the product and the sum (x86 with AVX2, ARM).
    ``weight_of`` gives the weight of a name, or raises ``KeyError``. Raises :class:`StoreDamaged`
    if the file is no update of these weights.
    """
    try:
        stored = load(open_file(path))
        moves = []
        for name in stored:
            if name.endswith(_ROWS):
                continue
            update, weight = stored[name], weight_of(name)
            shape = matrix(weight).shape
            if (rows := stored.get(name + _ROWS)) is not None:
                update = update.new_zeros(shape).index_copy_(0, rows, update)
            if update.shape != shape:
                raise ValueError(f"{tuple(update.shape)} rows and columns, not {tuple(shape)}")
            moves.append((weight, update.view(weight.shape)))
        if not moves:
            raise ValueError("it names no weight")
    except (OSError, SafetensorError, LookupError, ValueError, RuntimeError) as error:
        raise StoreDamaged(
            f"{path} is no update of this model's weights ({error}); restore it from a backup"
        ) from error
    with torch.no_grad():
        for weight, update in moves:
            weight.add_(update.to(weight.device), alpha=dose)
