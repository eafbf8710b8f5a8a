"""Capturing inside a plain PyTorch training loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradstore.capture.recorder import Recorder
from gradstore.store.store import Store


@contextmanager
def capture(
    model: nn.Module, store: Store | str | Path, optimizer: torch.optim.Optimizer, **options: Any
) -> Iterator[Recorder]:
    """Write every sample's gradient into ``store`` while the block trains ``model``.

    Pass the samples' ids (any kind, one a row) to the model as ``sample_ids=``; they are taken out
    before ``forward`` sees them. ``store`` is a :class:`Store` or a path, made if nothing is there.
    Options are :class:`Recorder`'s: ``run``, ``resume``, ``epochs_captured``, ``sides``, ``top_k``,
    ``layers``, ``tokenizer``, ``settings``. A block that ends with an error leaves a run
    marked failed, with what was captured and applied until then.
    """
    recorder = Recorder(model, Store.open_or_create(store), optimizer, **options)
    try:
        yield recorder
    except BaseException:
        recorder.abort()
        raise
    recorder.finish()
