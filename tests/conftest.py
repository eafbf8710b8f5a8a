"""What all tests share: one thread, a fixed seed, hypothesis without a clock, an exact store."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from gradstore import Store

settings.register_profile("gradstore", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("gradstore")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store that rounds nothing."""
    return Store.create(tmp_path / "store", dtype="float32")
