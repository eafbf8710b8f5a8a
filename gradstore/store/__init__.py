"""Records to disk and back: segments, their catalog, the background writer, recovery."""

from gradstore.store.format import ModelIdentity as ModelIdentity
from gradstore.store.store import Store as Store
