"""Records to disk and back: segments, their catalog, the writer; sealed, or elsewhere."""

from gradstore.store.format import ModelIdentity as ModelIdentity
from gradstore.store.store import Store as Store
