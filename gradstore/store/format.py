"""``gradstore.json``: what a store is, and which model its gradients belong to."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from gradstore.errors import (
    EncryptionError,
    ModelError,
    StoreDamaged,
    StoreExists,
    StoreMissing,
    StoreTooNew,
)
from gradstore.store import keys
from gradstore.store.files import (
    AWAY,
    HERE,
    canonical,
    make_folder,
    read_json,
    replace_durably,
    unlinked,
    write_durably,
    writing,
)

VERSION = 1
LATER = 2  # the version of stores that older releases refuse: encrypted, or with segments elsewhere
NAME = "gradstore.json"
PROFILES = ("packed", "raw", "small")  # compressed, as it lies in memory, or in eight bits
DTYPES = ("bfloat16", "float32")
MOST_BYTES = 1 << 20
LOSS = "gradients of each sample's own loss: next-token cross-entropy summed over its scored tokens"


@dataclass(frozen=True)
class ModelIdentity:
    """What must agree between a store and a model for gradients to fit its weights."""

    architecture: str
    vocabulary: int
    width: int
    head_width: int
    positions: int | None
    tied: bool
    tokenizer: str | None = None

    def check(self, other: ModelIdentity, where: str) -> None:
        """Raise :class:`ModelError` unless ``other`` is the same kind of model."""
        mine, theirs = asdict(self), asdict(other)
        for field, known in mine.items():
            given = theirs[field]
            if field == "tokenizer" and None in (known, given):
                continue
            if known != given:
                raise ModelError(
                    f"{where} is another model than the store's: {field} is {given}, the store "
                    f"has {known}. Give the checkpoint that the stored run wrote (`gradstore "
                    "runs`), or create another store for this model (`gradstore init`)."
                )


@dataclass(frozen=True)
class Elsewhere:
    """Where segments lie if not in the store, and how many bytes of their arrays are kept here."""

    url: str
    cache_bytes: int = 16 << 30


@dataclass(frozen=True)
class StoreFormat:
    """The contents of ``gradstore.json``."""

    format: int
    store: str
    created_at: str
    profile: str
    dtype: str
    loss: str
    model: ModelIdentity | None
    elsewhere: Elsewhere | None = None
    encryption: dict[str, str] | None = None

    @property
    def file_digest(self) -> str:
        """By what files of segments are known: a host that keeps them must not be able to forge."""
        return HERE if self.elsewhere is None else AWAY

    def save(self, root: Path) -> None:
        """Write it durably, in place of an older one."""
        temporary = root / f".tmp-{NAME}-{uuid.uuid4().hex}"
        said = asdict(self)
        for name in ("elsewhere", "encryption"):
            if said[name] is None:  # which is all that older releases know
                del said[name]
        said["digest"] = digest_of(said)
        write_durably(temporary, [json.dumps(said, indent=1).encode()])
        replace_durably(temporary, root / NAME)


def create(
    root: Path,
    profile: str,
    dtype: str,
    elsewhere: Elsewhere | None = None,
    master: bytes | None = None,
) -> StoreFormat:
    """Make an empty store at ``root``: a path that does not exist, or an empty folder.

    With a ``master`` key of 32 random bytes it is encrypted; the key itself is not kept in it, but
    looked for in the environment (:mod:`gradstore.store.keys`).
    """
    if profile not in PROFILES or dtype not in DTYPES:
        raise ValueError(f"profile is one of {PROFILES} and dtype one of {DTYPES}")
    if (profile, dtype) == ("small", "float32"):
        raise ValueError("profile small keeps factors in eight bits, not in float32")
    refuse_taken(root)
    with writing(root):
        root.parent.mkdir(parents=True, exist_ok=True)
    version = VERSION if elsewhere is None and master is None else LATER
    store, created = str(uuid.uuid4()), datetime.now(UTC).isoformat(timespec="seconds")
    encryption = None
    if master is not None:
        fingerprint = keys.Secret(store, master).fingerprint()
        encryption = {"cipher": keys.CIPHER, "fingerprint": fingerprint}
    stated = StoreFormat(version, store, created, profile, dtype, LOSS, None, elsewhere, encryption)
    if elsewhere is not None:
        from gradstore.store.remote import Remote

        Remote(root, stated).claim()
    for folder in ("segments", "published", *([] if master is None else [keys.FOLDER])):
        make_folder(root / folder)
    stated.save(root)
    return stated


def refuse_taken(root: Path) -> None:
    """Raise :class:`StoreExists` unless a store can be made at ``root``."""
    if root.is_file() or (root.is_dir() and any(root.iterdir())):
        what = "a store" if (root / NAME).exists() else "something else"
        raise StoreExists(f"{root} already holds {what}; choose another path")


def digest_of(said: dict[str, Any]) -> str:
    """SHA-256 of what the file says besides its own ``digest``."""
    return sha256(canonical({k: v for k, v in said.items() if k != "digest"})).hexdigest()


def load(root: Path) -> StoreFormat:
    """Read the format of the store at ``root``, refusing what this version cannot read.

    Raises :class:`EncryptionError` if it is encrypted and its keys are not there.
    """
    try:
        fields = read_json(unlinked(root / NAME, root), MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreMissing(
            f"there is no store at {root}; create one with `gradstore init {root}`"
        ) from None
    except ValueError as error:
        raise StoreDamaged(f"{root / NAME} is not JSON ({error}); restore it") from error
    try:
        if fields["format"] > LATER:
            raise StoreTooNew(
                f"{root} has format {fields['format']}; this gradstore reads up to {LATER}. "
                "Upgrade with `pip install --upgrade gradstore`."
            )
        fields.pop("digest", None)  # files of older releases have none; verify compares it
        _check(fields, {"format": int, "store": str, "profile": PROFILES, "dtype": DTYPES})
        if (model := fields["model"]) is not None:
            sizes = {"vocabulary": int, "width": int, "head_width": int, "tied": bool}
            _check(model, {"architecture": str, **sizes})
            if min(model["vocabulary"], model["width"], model["head_width"]) < 1:
                raise ValueError("a size of the model is below 1")
            fields["model"] = ModelIdentity(**model)
        if (elsewhere := fields.get("elsewhere")) is not None:
            _check(elsewhere, {"url": str, "cache_bytes": int})
            fields["elsewhere"] = Elsewhere(**elsewhere)
        if (encryption := fields.get("encryption")) is not None:
            _check(encryption, {"cipher": (keys.CIPHER,), "fingerprint": str})
            if not keys.is_encrypted(root):
                raise EncryptionError(
                    f"{root} is encrypted, and its folder {keys.FOLDER} is not there; mount or "
                    "restore it: without it nobody can read what the store holds"
                )
        elif keys.is_encrypted(root):
            raise ValueError(f"it says of no encryption, but there is a folder {keys.FOLDER}")
        return StoreFormat(**fields)
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise StoreDamaged(f"{root / NAME} is not a store's description ({error})") from error


def unlock(root: Path) -> StoreFormat:
    """The format of a store that can be read: of an encrypted one, with its master key."""
    stated = load(root)
    if stated.encryption is not None:
        keys.secret_of(root)
    return stated


def _check(fields: dict[str, Any], kinds: dict[str, Any]) -> None:
    for name, kind in kinds.items():
        value = fields[name]
        if value not in kind if isinstance(kind, tuple) else type(value) is not kind:
            raise ValueError(f"{name} is {value!r:.40}")
