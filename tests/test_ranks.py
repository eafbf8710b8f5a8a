"""Two ranks train one model: each writes its own samples, rank 0 enters them all."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import tiny
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from gradstore import Store, capture

SAMPLES, LENGTH = 8, 10


def rank_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = tiny("gpt2")
    tokens = torch.randint(1, model.config.vocab_size, (SAMPLES, LENGTH))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with capture(model, f"{folder}/store", optimizer) as recorder:
        for _ in recorder.epochs(1):
            for first in range(rank * 2, SAMPLES, 4):  # two samples a rank and step
                ids = tokens[first : first + 2]
                names = [f"s{n}" for n in range(first, first + 2)]
                parallel(input_ids=ids, labels=ids, sample_ids=names).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ranks_write_side_by_side(tmp_path: Path) -> None:
    Store.create(tmp_path / "store", dtype="float32")
    spawn(rank_of_two, (str(tmp_path),), nprocs=2)
    with Store.open(tmp_path / "store") as store:
        assert store.rows("SELECT run_id, status, steps FROM runs") == [(1, "finished", 2)]
        kept = store.rows("SELECT id, step, batch_share FROM gradients ORDER BY id")
        folders = store.rows("SELECT DISTINCT split_part(path, '/', 2) FROM segments ORDER BY 1")
        moments = store.rows(
            "SELECT moment FROM moments WHERE layer = 'embedding' ORDER BY step, moment DESC"
        )
    assert [(sample, step) for sample, step, _ in kept] == [
        (f"s{n}", 1 + (n >= 4)) for n in range(SAMPLES)
    ]
    tokens_of_a_step = 2 * 2 * (LENGTH - 1)  # of both ranks: gradients are averaged over them
    assert all(share == pytest.approx(1 / tokens_of_a_step, rel=1e-5) for *_, share in kept)
    assert folders == [("r0",), ("r1",)]
    assert moments == [("start",), ("first-epoch",), ("end",)]
