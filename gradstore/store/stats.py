"""How much a store holds, and how much smaller that is than dense gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradstore.store import catalog
from gradstore.store.files import size_of
from gradstore.store.manifest import segment_path

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
    sql = "SELECT path, bytes FROM segments WHERE kind = ?"
    in_segments = {
        kind: sum(
            max(size_of(segment_path(store.root, path)), size)  # arrays may lie elsewhere
            for path, size in store.rows(sql, [kind])
        )
        for kind in ("gradients", "moments", "holdout")
    }
    catalog_bytes = (store.root / catalog.NAME).stat().st_size
    facts = counts | {
        "gradient_bytes": in_segments["gradients"],
        "moment_bytes": in_segments["moments"],
        "catalog_bytes": catalog_bytes,
        "store_bytes": size_of(store.root),
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
