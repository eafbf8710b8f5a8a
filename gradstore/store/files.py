"""Durable file operations: what is renamed into place has reached the disk.

A store is personal data: what it makes is its owner's alone, whatever the umask allows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gradstore.errors import GradstoreError, StoreUnwritable

BLOCK_BYTES = 1 << 20


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
    path: Path, pieces: Iterable[bytes | memoryview], *, private: bool = True
) -> tuple[int, str]:
    """Write ``pieces`` to a new file and fsync it; returns its size in bytes and SHA-256.

    A file that a user named is not ``private``: their umask decides who may read it.
    """
    digest, size = hashlib.sha256(), 0
    opener = _private if private else None
    with writing(path), open(path, "xb", buffering=0, opener=opener) as file:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            digest.update(view)
            size += len(view)
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def make_folder(path: Path) -> None:
    """Make a private folder, and the ones above it that are missing, unless it is there."""
    with writing(path):
        for each in (*reversed(path.parents), path):
            if not each.is_dir():
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
    """fsync a folder, so that the names in it survive a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """fsync every folder at and below ``path`` (its files are fsynced when written)."""
    for folder, _, _ in os.walk(path, topdown=False):
        sync_folder(Path(folder))


def replace_durably(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target`` and fsync the parent: the moment of durability."""
    with writing(target):
        os.replace(source, target)
        sync_folder(target.parent)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
