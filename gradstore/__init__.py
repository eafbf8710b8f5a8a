"""gradstore: keep every training sample's gradient, forget a sample by its id, ask SQL about it."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

# In a source tree cli/, schemas/ and data/ lie beside this folder; once installed, inside it.
if not (_Path(__file__).parent / "cli").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

if _TYPE_CHECKING:
    from gradstore.capture.collator import IdCollator as IdCollator
    from gradstore.capture.loop import capture as capture
    from gradstore.capture.trainer import GradStoreCallback as GradStoreCallback
    from gradstore.errors import GradstoreError as GradstoreError
    from gradstore.factored import FactoredGradient as FactoredGradient
    from gradstore.store import Store as Store

__version__ = "0.1.0"

_HOMES = {  # imported on first use, so that the command line starts without torch
    "FactoredGradient": "gradstore.factored",
    "GradStoreCallback": "gradstore.capture.trainer",
    "GradstoreError": "gradstore.errors",
    "IdCollator": "gradstore.capture.collator",
    "Store": "gradstore.store",
    "capture": "gradstore.capture.loop",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradstore' has no attribute {name!r}")
    return getattr(_import_module(_HOMES[name]), name)
