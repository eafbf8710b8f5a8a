"""How much a store holds, and how much smaller that is than dense gradients."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from gradstore.store import catalog

if TYPE_CHECKING:
    from gradstore.store.store import Store


def stats(store: Store) -> dict[str, Any]:
    """What :meth:`gradstore.store.store.Store.stats` gives."""
    [counts] = store.table(
        """SELECT (SELECT count(*) FROM samples WHERE split = 'train') AS samples,
                  (SELECT count(*) FROM samples WHERE split = 'holdout') AS held_out,
                  (SELECT count(*) FROM exposures) AS gradients,
                  (SELECT count(*) FROM runs) AS runs,
                  (SELECT count(*) FROM requests) AS requests,
                  (SELECT count(*) FROM segments) AS segments"""
    )
    here, found = 0, Counter[str]()
    for path in store.root.rglob("*"):
        if path.is_file():
            size = path.stat().st_size
            here += size
            found["/".join(path.relative_to(store.root).parts[:3])] += size
    in_segments, away = Counter[str](), 0
    for path, kind, stated in store.rows("SELECT path, kind, bytes FROM segments"):
        in_segments[kind] += max(found[path], stated)
        away += max(stated - found[path], 0)  # arrays may lie elsewhere
    catalog_bytes = (store.root / catalog.NAME).stat().st_size
    facts = counts | {
        "gradient_bytes": in_segments["gradients"],
        "moment_bytes": in_segments["moments"],
        "catalog_bytes": catalog_bytes,
        "store_bytes": here + away,
    }
    if counts["gradients"]:
        each = (in_segments["gradients"] + catalog_bytes) / counts["gradients"]
        dense = 4 * store.model.vocabulary * store.model.width
        facts |= {
            "bytes_per_gradient": round(each),
            "dense_float32_bytes": dense,
            "times_smaller": round(dense / each, 1),
        }
    return facts
