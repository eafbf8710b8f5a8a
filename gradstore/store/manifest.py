"""The manifests of finished segments, read without loading an array."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from gradstore.errors import StoreDamaged

MANIFEST = "manifest.json"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a segment, with its own digest filled in."""
    try:
        text = (path / MANIFEST).read_bytes()
        manifest: dict[str, Any] = json.loads(text)
        manifest["segment"]["digest"] = sha256(text).hexdigest()
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StoreDamaged(
            f"{path / MANIFEST} is damaged ({error}); restore it from a backup"
        ) from error
    return manifest


def segment_paths(root: Path) -> list[Path]:
    """All finished segments below ``root``, oldest first within a rank."""
    return sorted((root / "segments").glob("r[0-9]*/[0-9]*"))
