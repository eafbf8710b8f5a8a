"""File operations of a store: what is renamed into place has reached the disk, and what is read
lies where it says, is as small as it may be, and is what its digest says.

A store is personal data: what it makes is its owner's alone, whatever the umask allows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from blake3 import blake3
from xxhash import xxh3_128

from gradstore.errors import GradstoreError, StoreDamaged, StoreUnwritable

BLOCK_BYTES = 1 << 20
WRITE_BYTES = 4 << 20  # at once: fewer calls, and what was just digested is still in the cache
# XXH3 finds accidents, at a sixth of BLAKE3's time; older stores have SHA-256
DIGESTS: dict[str, Callable[[], Any]] = {
    "xxh3_128": xxh3_128,
    "blake3": blake3,
    "sha256": hashlib.sha256,
}
HERE, AWAY = "xxh3_128", "blake3"  # of a segment's files: in a store, and where others keep them
SHARDS = ("c.0.0", "c.0", "c/0/0", "c/0")  # names of an array's file; the last are of older stores
Facts = Mapping[str, Any]  # of a file in a manifest: its bytes, and one digest by its name
SEAL = ".sha256"  # beside a file that no manifest or table speaks of
QUARANTINE = "quarantine"  # below a store: what a repair has set aside, by the names it had
RECEIPTS, SKETCHES = "receipts", "sketches"
UNFINISHED = "unfinished"  # what is left there belongs to requests that were interrupted
_TOGETHER = 8  # files synced at the same time: the file system commits them as one


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a refusal by the file system into one clear error that names the path."""
    try:
        yield
    except GradstoreError:  # some are OSErrors too, and already clear
        raise
    except OSError as error:
        raise unwritable(path, error.strerror or error) from error


def unwritable(path: Path, reason: object) -> StoreUnwritable:
    """The error for a write that was refused."""
    return StoreUnwritable(
        f"cannot write {path}: {reason}. Nothing committed so far is lost; "
        "free space or fix the permission, then run the same command again."
    )


def write_durably(
    path: Path,
    pieces: Iterable[bytes | memoryview],
    *,
    private: bool = True,
    sync: bool = True,
    digest: str = "sha256",
) -> tuple[int, str]:
    """Write ``pieces`` to a new file and fsync it; returns its size in bytes and a digest, in hex.

    A file that a user named is not ``private``: their umask decides who may read it. Without
    ``sync`` it is durable after :func:`sync_tree` of its folder: many files take far less so.
    """
    told, size = DIGESTS[digest](), 0
    opener = _private if private else None
    with writing(path), open(path, "xb", buffering=0, opener=opener) as file:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            if len(view) > WRITE_BYTES and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), size, len(view))  # its blocks at once, or none
            size += len(view)
            for start in range(0, len(view), WRITE_BYTES):
                block = view[start : start + WRITE_BYTES]
                told.update(block)
                while block:
                    block = block[file.write(block) :]
        if sync:
            os.fsync(file.fileno())
    return size, told.hexdigest()


def write_part(path: Path, pieces: Iterable[bytes | memoryview], digest: str = HERE) -> Facts:
    """Write a file of a segment, not synced yet; returns what the manifest is to say of it."""
    size, told = write_durably(path, pieces, sync=False, digest=digest)
    return {"bytes": size, digest: told}


def digest_in(facts: Facts) -> tuple[str, str]:
    """The digest that a manifest gives of a file, and its name. Raises ``ValueError``."""
    [name] = facts.keys() & DIGESTS.keys()
    return name, facts[name]


def is_told(pieces: Iterable[bytes], facts: Facts) -> bool:
    """Whether bytes are those of which a manifest says ``facts``."""
    name, wanted = digest_in(facts)
    found = DIGESTS[name]()
    for piece in pieces:
        found.update(piece)
    return bool(found.hexdigest() == wanted)


def make_folder(path: Path) -> None:
    """Make a private folder, and the ones above it that are missing, unless it is there."""
    with writing(path):
        missing = list(takewhile(lambda each: not each.is_dir(), (path, *path.parents)))
        for each in reversed(missing):
            each.mkdir(exist_ok=True)  # another rank may make it too
            each.chmod(0o700)


def make_file(path: Path) -> None:
    """Make a private, empty file for another to write into, unless it is there."""
    with writing(path):
        os.close(_private(path, os.O_WRONLY | os.O_CREAT))


def _private(path: str | Path, flags: int) -> int:
    handle = os.open(path, flags, 0o600)
    os.fchmod(handle, 0o600)
    return handle


def sync_folder(path: Path) -> None:
    """fsync a folder, so that the names in it survive a power loss; or a file that is written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """fsync every file below ``path``, several at once, then every folder, the deepest first."""
    walked = [(Path(folder), names) for folder, _, names in os.walk(path, topdown=False)]
    with ThreadPoolExecutor(_TOGETHER) as pool:
        list(pool.map(sync_folder, (folder / name for folder, names in walked for name in names)))
    for folder, _ in walked:
        sync_folder(folder)


def replace_durably(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target`` and fsync the parent: the moment of durability."""
    with writing(target):
        os.replace(source, target)
        sync_folder(target.parent)


def blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes, a megabyte at a time."""
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    for block in blocks(path):
        digest.update(block)
    return digest.hexdigest()


def seal(path: Path, digest: str) -> None:
    """Write a file's digest beside it, before the file is put there: ``sha256sum -c`` reads it."""
    beside = path.with_name(path.name + SEAL)
    with writing(beside):
        beside.unlink(missing_ok=True)
    write_durably(beside, [f"{digest}  {path.name}\n".encode()])


def sealed(path: Path) -> str | None:
    """The digest written beside a file; None where an older release wrote none.

    Raises :class:`StoreDamaged` where what lies there is no digest of this file.
    """
    beside = path.with_name(path.name + SEAL)
    try:
        with open(unlinked(beside, beside.parent), "rb") as file:
            said = file.read(1024)
    except FileNotFoundError:
        return None
    found = re.fullmatch(rb"([0-9a-f]{64})  " + re.escape(path.name.encode()) + rb"\n", said)
    if not found:
        raise StoreDamaged(f"{beside} is not the digest of {path.name}")
    return found[1].decode()


def unlinked(path: Path, root: Path) -> Path:
    """``path``, given that no step to it from ``root`` is a symbolic link.

    A store lies in its folder: a link would have it read, or worse remove, what is not its own.
    Raises :class:`StoreDamaged`.
    """
    step = str(root)
    for part in path.relative_to(root).parts:
        step = os.path.join(step, part)
        if os.path.islink(step):
            raise StoreDamaged(f"{step} is a symbolic link, which a store does not follow")
    return path


def read_json(path: Path, limit: int) -> Any:
    """A JSON document of at most ``limit`` bytes. Raises OSError or ValueError for anything else.

    (A document nested too deeply raises ValueError too.)
    """
    with open(path, "rb") as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise ValueError(f"it is longer than {limit} bytes")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def canonical(document: Any) -> bytes:
    """A document's canonical JSON, to hash and sign: sorted keys, no spaces, no NaN."""
    return json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()
