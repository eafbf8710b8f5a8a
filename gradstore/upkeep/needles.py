"""Looking for many byte patterns at once, without looking at every byte for each.

Of words of w bytes that lie n − w + 1 bytes apart, or less, any stretch of n bytes holds one whole.
So it is enough to look at these words: a table says whether one is a part of a pattern, and only
around those that are, bytes are compared. Nothing is missed, and long patterns cost next to
nothing. (After Wu and Manber, A fast algorithm for multi-pattern searching, TR-94-17, University of
Arizona, 1994, who shift by what they read instead.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

BLOCK_BYTES = 1 << 19  # to search at a time: they stay in the cache
_LONG = 64  # bytes of a pattern from which words of eight bytes tell more
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ / golden ratio, odd: Knuth's multiplicative hash
_BITS = 20  # of a hash: a table of a megabyte


class Needles:
    """Patterns to look for in streams of bytes."""

    def __init__(self, needles: Iterable[bytes]) -> None:
        self._needles = tuple(dict.fromkeys(needles))
        self._reach = max(map(len, self._needles), default=0)
        long = [needle for needle in self._needles if len(needle) >= _LONG]
        short = [needle for needle in self._needles if len(needle) < _LONG]
        self._sieves = [_Sieve(group) for group in (long, short) if group]

    def within(self, blocks: Iterable[np.ndarray]) -> set[bytes]:
        """The patterns in bytes that come in blocks, (n,) uint8 each, one after another."""
        found, before = set[bytes](), b""
        for block in blocks if self._needles else ():
            seam = before + block[: self._reach].tobytes()
            found.update(needle for needle in self._needles if needle in seam)
            for sieve in self._sieves:
                found |= sieve.within(block)
            whole = len(block) >= self._reach
            before = block[-self._reach :].tobytes() if whole else seam[-self._reach :]
        return found


def blocks_of(path: Path) -> Iterator[np.ndarray]:
    """A file's bytes, (n,) uint8 at a time: each block is there until the next is asked for."""
    block = np.empty(BLOCK_BYTES, np.uint8)
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block.data):
            yield block[:size]


class _Sieve:
    """Patterns of about one length, and the parts of them that words are held against."""

    def __init__(self, needles: Sequence[bytes]) -> None:
        shortest = min(map(len, needles))
        kind = np.uint64 if shortest >= _LONG else np.uint16 if shortest > 2 else np.uint8
        self._word = np.dtype(kind).newbyteorder("<")
        size = self._word.itemsize
        self._step = (shortest - size + 1) // size  # words from one that is looked at to the next
        parts = {n[at : at + size] for n in needles for at in range(self._step * size)}
        self._parts = np.unique(np.frombuffer(b"".join(parts), self._word))
        self._table = np.zeros(1 << (_BITS if size == 8 else 8 * size), bool)
        self._table[self._places(self._parts)] = True
        self._needles, self._longest = needles, max(map(len, needles))

    def within(self, block: np.ndarray) -> set[bytes]:
        """Those that lie in a block as a whole."""
        around = self._around(block)
        return {needle for held in around for needle in self._needles if needle in held}

    def _around(self, block: np.ndarray) -> Iterator[bytes]:
        """What lies around words of a block that are a part of a pattern."""
        size = self._word.itemsize
        words = block[: len(block) // size * size].view(self._word)[:: self._step]
        hits = np.flatnonzero(self._table.take(self._places(words)))
        if size == 8 and len(hits):
            near = self._parts.searchsorted(words[hits])
            hits = hits[self._parts.take(near, mode="clip") == words[hits]]
        before = self._step * size
        if len(hits) * (before + self._longest) > len(block):
            yield block.tobytes()
            return
        for at in (hits * before).tolist():
            yield block[max(0, at - before) : at + self._longest].tobytes()

    def _places(self, words: np.ndarray) -> np.ndarray:
        """Where a table has words."""
        if self._word.itemsize < 8:
            return words
        return ((words * _MIX) >> np.uint64(64 - _BITS)).view(np.int64)
