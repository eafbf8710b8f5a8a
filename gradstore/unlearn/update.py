"""What a request added to the embedding, kept so that it can be added again, bit by bit."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from gradstore.errors import StoreDamaged


def pack(update: Float[Tensor, "V d"]) -> bytes:
    """A safetensors file of the update: dense, or the rows that are not zero where that is smaller.

    ``embedding`` is (V, d) or (rows, d) in the update's own precision; ``embedding.rows``, only in
    the second form, the int64 indices of these rows.
    """
    update = update.detach().cpu().contiguous()
    # -0.0 is kept as well: added to a weight of -0.0 it gives other bits than 0.0 does
    touched = (update.ne(0) | update.signbit()).any(dim=1).nonzero().squeeze(1)
    row_bytes = update.shape[1] * update.element_size()
    if len(touched) * (row_bytes + touched.element_size()) < len(update) * row_bytes:
        return save({"embedding": update[touched], "embedding.rows": touched})
    return save({"embedding": update})


def add(weight: Float[Tensor, "V d"], path: Path, dose: float) -> None:
    """Add a stored update ``dose`` times to a weight, in place.

    The whole matrix is added in one call, as :class:`gradstore.unlearn.walk.Walk` does: the result
    has the same bits wherever PyTorch fuses the product and the sum (x86 with AVX2, ARM). Raises
    :class:`StoreDamaged` if the file is no update of this weight.
    """
    try:
        stored = load_file(path)
        update = stored["embedding"]
        if (rows := stored.get("embedding.rows")) is not None:
            update = update.new_zeros(weight.shape).index_copy_(0, rows, update)
        if update.shape != weight.shape:
            raise ValueError(f"{tuple(update.shape)} rows and columns, not {tuple(weight.shape)}")
    except (OSError, SafetensorError, LookupError, ValueError, RuntimeError) as error:
        raise StoreDamaged(
            f"{path} is no update of this model's embedding ({error}); restore it from a backup"
        ) from error
    with torch.no_grad():
        weight.add_(update.to(weight.device), alpha=dose)
