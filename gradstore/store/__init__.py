"""Records to disk and back: segments, their catalog, the background writer, recovery."""

from gradstore.store.format import ModelIdentity
from gradstore.store.store import Store

__all__ = ["ModelIdentity", "Store"]
