"""Patterns are found wherever they lie, however the bytes are cut: the oracle is ``in``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstore.upkeep.needles import BLOCK_BYTES, Needles, blocks_of


def cut(held: bytes, at: list[int]) -> list[np.ndarray]:
    """Bytes as blocks that end at some places."""
    ends = sorted({min(place, len(held)) for place in at} | {len(held)})
    starts = [0, *ends]
    return [
        np.frombuffer(held[start:stop], np.uint8) for start, stop in zip(starts, ends, strict=False)
    ]


@given(
    held=st.binary(max_size=400),
    letters=st.integers(1, 256),
    places=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 200)), max_size=6),
    others=st.lists(st.binary(min_size=1, max_size=90), max_size=4),
    ends=st.lists(st.integers(0, 400), max_size=6),
)
@settings(max_examples=200, deadline=None)
def test_those_that_are_there_are_found_and_no_others(
    held: bytes,
    letters: int,
    places: list[tuple[int, int]],
    others: list[bytes],
    ends: list[int],
) -> None:
    held = bytes(byte % letters for byte in held)  # few letters: much is alike
    needles = [held[start : start + size] for start, size in places]
    needles = [needle for needle in [*needles, *others] if needle]
    wanted = {needle for needle in needles if needle in held}
    assert Needles(needles).within(cut(held, ends)) == wanted


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 63, 64, 65, 1536])
def test_at_every_offset_and_over_the_ends_of_blocks(size: int) -> None:
    drawn = np.random.default_rng(size)
    needle, block = drawn.bytes(size), 4096
    for start in [*range(40), *range(block - size - 3, block + 3)]:
        held = np.zeros(3 * block, np.uint8)
        held[start : start + size] = np.frombuffer(needle, np.uint8)
        halves = [held[:block], held[block:]]
        other = bytes([*needle[:-1], needle[-1] ^ 1])
        assert Needles([needle, other * 2]).within(halves) == {needle}


def test_many_are_told_apart_in_bytes_that_are_all_alike() -> None:
    needles = [bytes(100) + bytes([n]) for n in range(1, 200)]
    held = np.frombuffer(bytes(50_000) + b"\x07" + bytes(50_000) + b"\x09", np.uint8)
    assert Needles(needles).within([held]) == {needles[6], needles[8]}
    assert Needles([]).within([held]) == set()


def test_a_file_comes_whole(tmp_path: Path) -> None:
    held = np.random.default_rng(0).bytes(2 * BLOCK_BYTES + 12_345)
    (tmp_path / "held").write_bytes(held)
    assert b"".join(block.tobytes() for block in blocks_of(tmp_path / "held")) == held
