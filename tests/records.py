"""Synthetic records whose every value follows from their id, so that any reader can check them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from gradstore import Store
from gradstore.store.record import Exposure, OutputSide, Record
from gradstore.store.writer import SegmentWriter

VOCABULARY = 500
WIDTH = 16
KEPT = 4
RUN: dict[str, Any] = {"epochs_captured": "all", "sides": "both", "top_k": KEPT}


def generator(*seed: object) -> torch.Generator:
    """A generator that is a function of ``seed`` alone, in every process."""
    digest = sha256(repr(seed).encode("utf-8", "backslashreplace")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def tail(name: str = "tail", vocabulary: int = VOCABULARY) -> Tensor:
    """A distribution over the vocabulary."""
    return torch.rand(vocabulary, generator=generator(name, vocabulary)).softmax(0)


def record(
    id: str,
    *,
    epoch: int = 1,
    rows: int | None = None,
    width: int = WIDTH,
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = torch.bfloat16,
    tail: Tensor | None = None,
) -> Record:
    """The record of ``id`` in ``epoch``; with a ``tail`` it has an output side too."""
    seed = generator(id, epoch)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=seed)

    def below(limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=seed)

    t = int(below(30, 1)) + 1 if rows is None else rows
    output = None
    if tail is not None:
        value, label, mass = normal(t, KEPT).half(), normal(t).half(), normal(t).half()
        hidden = normal(t, width).to(dtype)
        output = OutputSide(hidden, below(vocabulary, t, KEPT), value, label, mass, tail)
    exposure = Exposure(
        id=id,
        epoch=epoch,
        step=int(below(1000, 1)) + 1,
        learning_rate=float(normal(1).double().exp()),
        batch_share=float(normal(1).double().exp()),
        grad_scale=1.0,
        loss=float(normal(1)),
        scored_tokens=t,
        d_norm=float(normal(1).abs()),
        h_norm=None if output is None else float(normal(1).abs()),
        mass_kept=None if output is None else float(normal(1).abs()),
        relative_error=None,
        position_start=int(below(8, 1)) or None,
    )
    scored = below(2, t).bool()
    return Record(exposure, below(vocabulary, t + 1), scored, normal(t, width).to(dtype), output)


def records(*ids: str, **options: Any) -> list[Record]:
    """One record for each id."""
    return [record(id, **options) for id in ids]


def assert_equal(got: Record, want: Record) -> None:
    """All values and the types of all factors agree, to the bit."""
    assert asdict(got.exposure) == asdict(want.exposure)
    assert got.tokens.tolist() == want.tokens.tolist()
    assert got.scored.tolist() == want.scored.tolist()
    _identical(got.D, want.D)
    assert (got.output is None) == (want.output is None)
    if got.output is not None and want.output is not None:
        assert got.output.index.tolist() == want.output.index.tolist()
        for part in ("H", "value", "label", "tail_mass", "tail"):
            _identical(getattr(got.output, part), getattr(want.output, part))


def assert_all_equal(got: Sequence[Record], want: Sequence[Record]) -> None:
    """The same records in the same order."""
    assert [r.exposure.id for r in got] == [r.exposure.id for r in want]
    for one, other in zip(got, want, strict=True):
        assert_equal(one, other)


def _identical(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


def fill(store: Store, batch: list[Record], run: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write records into a run; returns the run."""
    run = store.begin_run(RUN) if run is None else run
    into = SegmentWriter(store, run)
    into.put(batch)
    into.close()
    return run


def stored(store: Store, run_id: int = 1) -> list[Record]:
    """All records of a run, by sample and epoch."""
    numbers = [n for (n,) in store.rows("SELECT sample_id FROM samples ORDER BY sample_id")]
    return list(store.records(numbers, run_id))
