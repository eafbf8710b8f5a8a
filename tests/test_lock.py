"""Locks end with whoever took them."""

import os
import signal
import time
from pathlib import Path

import pytest

from gradstore.store.catalog import lock


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_lock_is_let_go_though_a_forked_child_lives_on(tmp_path: Path) -> None:
    with lock(tmp_path / "lock", 0, "testing"):
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
    try:
        with lock(tmp_path / "lock", 0, "testing"):
            assert (tmp_path / "lock").read_text() == str(os.getpid())
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
