"""The audit chain: what was done to models and to the store, each entry naming the one before.

Entries hold no personal data: ids appear as hashes, salted as in receipts, or keyed where they were
erased (:mod:`gradstore.store.erasures`). Receipts are documents of their own and
have a chain that can be checked without the store; an entry names a receipt by its digest. A chain
shows that an entry was changed or taken out between others; that the last ones are missing, or that
all of it was written anew, shows only a digest that was kept elsewhere: the pinned head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from gradstore.store.catalog import Connection, insert, now
from gradstore.store.files import canonical

COLUMNS = ("number", "created_at", "kind", "subject", "details", "previous", "digest")
SELECT = f"SELECT {', '.join(COLUMNS)} FROM audit ORDER BY number"


def hash_of(identity: str, content: str | bytes) -> str:
    """The name of an id, or of other content, in the receipts of one store.

    SHA-256 of the store's ``identity`` (a random UUID) and the content. Who has the store's
    ``gradstore.json`` can test a list of ids against it.
    """
    data = content if isinstance(content, bytes) else content.encode()
    return sha256(f"{identity}\n".encode() + data).hexdigest()


def append(connection: Connection, kind: str, subject: str, details: Mapping[str, Any]) -> str:
    """Add an entry in the transaction that does what it says; returns its digest.

    ``subject`` is hashes of ids with spaces between, or ``request:<number>``;
    ``details`` are figures. Neither holds an id.
    """
    last = connection.execute(
        "SELECT number, digest FROM audit ORDER BY number DESC LIMIT 1"
    ).fetchall()
    number, previous = last[0] if last else (0, None)
    stated = canonical(details).decode()
    row = dict(zip(COLUMNS, (number + 1, now(), kind, subject, stated, previous), strict=False))
    row["digest"] = digest_of(row)
    insert(connection, "audit", {name: [value] for name, value in row.items()})
    return str(row["digest"])


def digest_of(row: Mapping[str, Any]) -> str:
    """The digest of an entry, from its other columns."""
    entry = {name: row[name] for name in COLUMNS if name != "digest"}
    entry |= {"created_at": row["created_at"].isoformat(), "details": json.loads(row["details"])}
    return sha256(canonical(entry)).hexdigest()


def check(rows: Sequence[Mapping[str, Any]], head: str | None = None) -> list[str]:
    """What is wrong with a chain, as sentences; ``rows`` are all of table ``audit`` by number.

    ``head`` is the digest of an entry, kept elsewhere: the chain may have grown since, but must
    still hold that entry.
    """
    findings, previous = [], None
    for place, row in enumerate(rows, 1):
        if row["number"] != place:
            findings.append(f"where entry {place} should be, there is entry {row['number']}")
        if row["previous"] != previous:
            findings.append(f"entry {row['number']} does not follow the one before it")
        try:
            if digest_of(row) != row["digest"]:
                findings.append(f"entry {row['number']} is not what its digest says")
        except ValueError:
            findings.append(f"entry {row['number']} is no entry: its details are not JSON")
        previous = row["digest"]
    if head is not None and head not in (row["digest"] for row in rows):
        findings.append(f"no entry has the digest {head}: entries were taken out or written anew")
    return findings
