"""The keys of an encrypted store: a master key that it does not hold, and a key for each record.

Every segment has a file of keys outside of it, ``keys/r<rank>/<number>``, made before the segment
and never changed but for shredding: a header, then slots of the same size, one for each sample that
the segment holds something of. A slot has a random data key, wrapped by a key that the master key
and the file's own salt give, and a name by which the sample's slots are found again in all files,
those of segments that are long gone too. Shredding writes zeros over a slot: whatever copy of a
segment there is, nobody reads that record in it again. Files are not renamed, rewritten or copied,
so there is no older version of a slot.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradstore.errors import EncryptionError, KeyShredded, StoreDamaged
from gradstore.store.files import (
    make_folder,
    read_json,
    sync_folder,
    unlinked,
    write_durably,
    writing,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FOLDER = "keys"  # of a store
CIPHER = "AES-256-GCM"
ENVIRONMENT = ("GRADSTORE_KEY_FILE", "GRADSTORE_KEY")
SHARED, ORDER = "shared", "order"  # owners of what is no single sample's
_MAGIC, _SALT, _NAME, _KEY, _TAG, _NONCE = b"gradstore keys 1", 48, 16, 32, 16, 12
_HEADER, SLOT = len(_MAGIC) + _SALT, _NAME + _KEY + _TAG
_SHREDDED = bytes(SLOT)
_MOST_BYTES = 1 << 20  # of gradstore.json


# -- the master key --------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Secret:
    """A store's UUID and its master key of 32 bytes."""

    store: str
    master: bytes

    def derive(self, purpose: str, salt: bytes = b"") -> bytes:
        """32 bytes for a purpose: HKDF-SHA256 (RFC 5869)."""
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        info = f"gradstore {purpose}\n{self.store}".encode()
        return HKDF(algorithm=SHA256(), length=_KEY, salt=salt, info=info).derive(self.master)

    def fingerprint(self) -> str:
        """By which the right master key is known: it tells nothing about the key."""
        return self.derive("fingerprint").hex()


def parse(text: str, where: str) -> bytes:
    """A master key from text: 32 bytes in hex or base64. Raises :class:`EncryptionError`."""
    text = text.strip()
    try:
        hexadecimal = re.fullmatch(r"[0-9a-fA-F]{64}", text)
        key = bytes.fromhex(text) if hexadecimal else base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != _KEY:
        raise EncryptionError(
            f"{where} holds no master key; expected 32 random bytes in hex or base64, as "
            "`openssl rand -hex 32` prints"
        )
    return key


def read_file(file: Path) -> bytes:
    """The master key in a file. Raises :class:`EncryptionError`."""
    try:
        with open(file, "rb") as opened:
            return parse(opened.read(1024).decode("ascii", "replace"), str(file))
    except OSError as error:
        raise EncryptionError(
            f"the master key's file {file} cannot be read: {error.strerror}"
        ) from error


def new_file(file: Path) -> bytes:
    """Write a new master key to a file that does not exist yet, its owner's alone."""
    key = os.urandom(_KEY)
    write_durably(file, [key.hex().encode() + b"\n"])
    sync_folder(file.resolve().parent)
    return key


def from_environment() -> bytes | None:
    """The master key that ``GRADSTORE_KEY_FILE`` (its file), else ``GRADSTORE_KEY``, gives."""
    file, text = map(os.environ.get, ENVIRONMENT)
    if file:
        return read_file(Path(file))
    return parse(text, ENVIRONMENT[1]) if text else None


def secret_of(root: Path) -> Secret:
    """The master key of the encrypted store at ``root``, from the environment.

    Raises :class:`EncryptionError` if there is none, or another store's.
    """
    try:
        said = read_json(unlinked(root / "gradstore.json", root), _MOST_BYTES)
        store, expected = str(said["store"]), str(said["encryption"]["fingerprint"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StoreDamaged(
            f"{root / 'gradstore.json'} does not say how {root / FOLDER} is used; restore it"
        ) from error
    master = from_environment()
    if master is None:
        raise EncryptionError(
            f"{root} is encrypted, and there is no master key: name its file, as in "
            f"`{ENVIRONMENT[0]}=FILE gradstore stats -s {root}`, or put its text into "
            f"{ENVIRONMENT[1]}"
        )
    secret = Secret(store, master)
    if secret.fingerprint() != expected:
        given = next(name for name in ENVIRONMENT if os.environ.get(name))
        raise EncryptionError(
            f"{given} gives another master key than the one {root} was made with; name the right "
            f"file, as in `{ENVIRONMENT[0]}=FILE gradstore stats -s {root}`"
        )
    return secret


def is_encrypted(root: Path) -> bool:
    """Whether what is written into the store at ``root`` is sealed, and only that is read."""
    return (root / FOLDER).is_dir()


# -- keys of records -------------------------------------------------------------------------


def owner(id: str) -> str:
    """A sample as the owner of a slot."""
    return f"id:{id}"


class Keys:
    """The data keys of what lies at ``place`` below a store: a segment, or a single file."""

    def __init__(self, secret: Secret, place: str, content: bytes) -> None:
        if not content.startswith(_MAGIC) or (len(content) - _HEADER) % SLOT:
            raise StoreDamaged(f"the keys of {place} are no file of keys; restore it")
        self.place, self._held = place, content
        self._ciphers: dict[int, AESGCM] = {}
        self._store = secret.store
        self._wrapping = _aes(secret.derive(f"keys of {place}", content[len(_MAGIC) : _HEADER]))

    @classmethod
    def create(cls, root: Path, place: str, owners: Sequence[str]) -> Keys:
        """Make new keys, durably, one for each owner, in that order."""
        secret, salt = secret_of(root), os.urandom(_SALT)
        wrapping, naming = _aes(secret.derive(f"keys of {place}", salt)), _naming(secret)
        slots = []
        for number, of in enumerate(owners):
            name = _name(naming, of)
            slots.append(name + wrapping.encrypt(_nonce(number), os.urandom(_KEY), name))
        content = b"".join([_MAGIC, salt, *slots])
        file = path_of(root, place)
        make_folder(file.parent)
        write_durably(file, [content])
        sync_folder(file.parent)
        sync_folder(file.parent.parent)
        return cls(secret, place, content)

    @classmethod
    def open(cls, root: Path, place: str) -> Keys:
        """The keys of what lies at a place; raises :class:`EncryptionError` without the master key,
        :class:`StoreDamaged` where the file is gone or no file of keys."""
        secret, file = secret_of(root), path_of(root, place)
        try:
            return cls(secret, place, file.read_bytes())
        except OSError as error:
            raise StoreDamaged(
                f"the keys of {place}, {file}, cannot be read ({error.strerror}): without them "
                "nobody can read it; restore them"
            ) from error

    def check(self, slot: int) -> None:
        """Raise :class:`StoreDamaged` unless there is a key in a slot."""
        self._cipher(slot)

    def shredded(self, slot: int) -> bool:
        """Whether what was sealed under a slot can never be read again."""
        return self._slot(slot) == _SHREDDED

    def seal_into(self, slot: int, what: str, content: Any, message: memoryview) -> None:
        """Write nonce, ciphertext and tag of bytes into a buffer of their very size.

        ``what`` says what they are, and must be said again to open them.
        """
        nonce = os.urandom(_NONCE)
        message[:_NONCE] = nonce
        self._cipher(slot).encrypt_into(nonce, content, self._bound(what), message[_NONCE:])

    def seal(self, slot: int, what: str, content: bytes) -> bytes:
        """The message that bytes become."""
        message = bytearray(len(content) + OVERHEAD)
        self.seal_into(slot, what, content, memoryview(message))
        return bytes(message)

    def open_into(self, slot: int, what: str, message: memoryview, target: Any) -> None:
        """Open a message into a buffer of its very size. Raises :class:`StoreDamaged`."""
        from cryptography.exceptions import InvalidTag

        try:
            self._cipher(slot).decrypt_into(
                message[:_NONCE], message[_NONCE:], self._bound(what), target
            )
        except (InvalidTag, ValueError) as error:
            raise StoreDamaged(
                f"{self.place}: {what.split(',')[0]} is not what was sealed there; restore it from "
                "a backup"
            ) from error

    def opened(self, slot: int, what: str, message: memoryview) -> bytearray:
        """What a message holds. Raises :class:`StoreDamaged`."""
        target = bytearray(max(0, len(message) - OVERHEAD))
        self.open_into(slot, what, message, target)
        return target

    def _bound(self, what: str) -> bytes:
        """What is authenticated with a message: where it belongs."""
        return f"{self._store}\n{self.place}\n{what}".encode()

    def _cipher(self, slot: int) -> AESGCM:
        if slot not in self._ciphers:
            from cryptography.exceptions import InvalidTag

            held = self._slot(slot)
            if held == _SHREDDED:
                raise KeyShredded(
                    f"{self.place}: the key of a record was shredded, as `gradstore erase` does; "
                    "nobody can read it again. Erase the same ids here too"
                )
            try:
                key = self._wrapping.decrypt(_nonce(slot), held[_NAME:], held[:_NAME])
            except (InvalidTag, ValueError) as error:
                raise StoreDamaged(
                    f"slot {slot} of the keys of {self.place} is not what was written; restore it"
                ) from error
            self._ciphers[slot] = _aes(key)
        return self._ciphers[slot]

    def _slot(self, number: int) -> bytes:
        held = self._held[_HEADER + number * SLOT : _HEADER + (number + 1) * SLOT]
        if number < 0 or len(held) != SLOT:
            raise StoreDamaged(f"the keys of {self.place} have no slot {number}; restore them")
        return held


OVERHEAD = _NONCE + _TAG  # bytes of a message beyond what it holds


def path_of(root: Path, place: str) -> Path:
    """Where the keys of ``segments/r0/000001``, or of another place below a store, lie."""
    return unlinked(root / FOLDER / place.removeprefix("segments/"), root)


def files_of(root: Path) -> Iterator[tuple[str, Path]]:
    """All files of keys, with the places that they belong to."""
    for file in sorted((root / FOLDER).glob("*/*")):
        name = file.relative_to(root / FOLDER).as_posix()
        yield (f"segments/{name}" if re.match("r[0-9]", name) else name), unlinked(file, root)


Slots = tuple[str, Path, list[int]]  # a place, its file of keys, and where slots start in it


def slots_of(
    root: Path, ids: Iterable[str], kept: Collection[str] | None = None
) -> Iterator[Slots]:
    """The slots that samples still have, by file.

    With the places of the segments that are ``kept``, those of orders that are not, too.
    """
    naming = _naming(secret_of(root))
    wanted, order = {_name(naming, owner(id)) for id in ids}, _name(naming, ORDER)
    for place, file in files_of(root):
        content = file.read_bytes()
        names = wanted if kept is None or place in kept else {*wanted, order}
        starts = range(_HEADER, len(content), SLOT)
        if found := [at for at in starts if content[at : at + _NAME] in names]:
            yield place, file, found


def holding(root: Path, ids: Iterable[str]) -> set[str]:
    """Places that samples still have keys for, and those where some key was shredded."""
    found = {place for place, *_ in slots_of(root, ids)}
    for place, file in files_of(root):
        content = file.read_bytes()
        if any(content[at : at + SLOT] == _SHREDDED for at in range(_HEADER, len(content), SLOT)):
            found.add(place)
    return found


def unreadable(root: Path, places: Collection[str]) -> Iterator[tuple[Path, str]]:
    """Files of keys, but for those of ``places``, that are not what was written, and why."""
    secret = secret_of(root)
    for place, file in files_of(root):
        content = file.read_bytes()
        try:
            if place not in places:
                found = Keys(secret, place, content)
                for slot in range((len(content) - _HEADER) // SLOT):
                    if not found.shredded(slot):
                        found.check(slot)
        except StoreDamaged as error:
            yield file, str(error)


def shred(root: Path, ids: Collection[str], kept: Collection[str]) -> None:
    """Write zeros over every key of samples, and of orders that are not ``kept``, in place."""
    for _, file, starts in slots_of(root, ids, kept):
        _overwrite(file, starts)


def discard(root: Path, place: str) -> None:
    """Shred the keys of a single file, and remove them."""
    file = path_of(root, place)
    if file.exists():
        _overwrite(file, range(_HEADER, file.stat().st_size, SLOT))
        file.unlink()
        sync_folder(file.parent)


def _overwrite(file: Path, starts: Iterable[int]) -> None:
    with writing(file), open(file, "r+b", buffering=0) as opened:
        for start in starts:
            opened.seek(start)
            opened.write(_SHREDDED)
        os.fsync(opened.fileno())


def _aes(key: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)


def _nonce(slot: int) -> bytes:
    """Of a wrapped key: no two slots of a file have one, and no two files a wrapping key."""
    return slot.to_bytes(_NONCE, "big")


def _naming(secret: Secret) -> bytes:
    return secret.derive("names of owners")


def _name(naming: bytes, of: str) -> bytes:
    return hmac.digest(naming, of.encode("utf-8", "surrogatepass"), hashlib.sha256)[:_NAME]
