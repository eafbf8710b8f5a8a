"""``gradstore.json``: what a store is, and which model its gradients belong to."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from gradstore.errors import ModelError, StoreDamaged, StoreExists, StoreMissing, StoreTooNew
from gradstore.store.files import make_folder, replace_durably, write_durably, writing

VERSION = 1
NAME = "gradstore.json"
PROFILES = ("packed", "raw")  # compressed, or as it lies in memory
DTYPES = ("bfloat16", "float32")
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
class StoreFormat:
    """The contents of ``gradstore.json``."""

    format: int
    store: str
    created_at: str
    profile: str
    dtype: str
    loss: str
    model: ModelIdentity | None

    def save(self, root: Path) -> None:
        """Write it durably, in place of an older one."""
        temporary = root / f".tmp-{NAME}-{os.getpid()}"
        write_durably(temporary, [json.dumps(asdict(self), indent=1).encode()])
        replace_durably(temporary, root / NAME)


def create(root: Path, profile: str, dtype: str) -> StoreFormat:
    """Make an empty store at ``root``: a path that does not exist, or an empty folder."""
    if profile not in PROFILES or dtype not in DTYPES:
        raise ValueError(f"profile is one of {PROFILES} and dtype one of {DTYPES}")
    if root.is_file() or (root.is_dir() and any(root.iterdir())):
        what = "a store" if (root / NAME).exists() else "something else"
        raise StoreExists(f"{root} already holds {what}; choose another path")
    with writing(root):
        root.parent.mkdir(parents=True, exist_ok=True)
    for folder in (root / "segments", root / "published"):
        make_folder(folder)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    stated = StoreFormat(VERSION, str(uuid.uuid4()), created, profile, dtype, LOSS, None)
    stated.save(root)
    return stated


def load(root: Path) -> StoreFormat:
    """Read the format of the store at ``root``, refusing what this version cannot read."""
    try:
        fields = json.loads((root / NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise StoreMissing(
            f"there is no store at {root}; create one with `gradstore init {root}`"
        ) from None
    except ValueError as error:
        raise StoreDamaged(f"{root / NAME} is not JSON ({error}); restore it") from error
    try:
        if fields["format"] > VERSION:
            raise StoreTooNew(
                f"{root} has format {fields['format']}; this gradstore reads up to {VERSION}. "
                "Upgrade with `pip install --upgrade gradstore`."
            )
        if fields["model"] is not None:
            fields["model"] = ModelIdentity(**fields["model"])
        return StoreFormat(**fields)
    except (TypeError, KeyError) as error:
        raise StoreDamaged(f"{root / NAME} is not a store's description ({error})") from error
