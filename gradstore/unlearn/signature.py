"""Ed25519 signatures of receipts: who vouches for one, to those who do not trust the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from gradstore.errors import ForgetError
from gradstore.store.audit import canonical
from gradstore.store.store import Store
from gradstore.unlearn import receipt as receipts


def sign(store: Store, number: int, key: Path) -> Path:
    """Sign a receipt's canonical JSON with a private key (PEM without a password).

    Writes the 64 bytes of the signature, in hex, beside the receipt and returns where. Raises
    :class:`ForgetError` if the receipt is not the one that was written or the file no such key.
    """
    receipt = receipts.read(store, number)
    if receipts.digest_of(receipt) != receipts.digests(store)[number]:
        raise ForgetError(
            f"receipt {number} is not what the catalog says was written, so it is not signed; "
            f"see `gradstore receipt verify {number} -s {store.root}`"
        )
    try:
        private = load_pem_private_key(key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _no_key(key, "private", error) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise _no_key(key, "private", type(private).__name__)
    path = receipts.path_of(store, number, "sig")
    receipts.put(path, private.sign(canonical(receipt)).hex().encode() + b"\n")
    return path


def check(store: Store, number: int, receipt: dict[str, Any], key: Path) -> tuple[bool, str]:
    """Whether a receipt's signature is of this document and by this key's owner, and why not.

    Raises :class:`ForgetError` if the file is no public Ed25519 key (PEM).
    """
    try:
        public = load_pem_public_key(key.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise _no_key(key, "public", error) from error
    if not isinstance(public, Ed25519PublicKey):
        raise _no_key(key, "public", type(public).__name__)
    try:
        signature = bytes.fromhex(receipts.path_of(store, number, "sig").read_text())
        public.verify(signature, canonical(receipt))
    except FileNotFoundError:
        return False, f"none; sign with `gradstore receipt sign {number} --key FILE`"
    except (InvalidSignature, ValueError):
        return False, f"not of this receipt by the owner of {key}"
    return True, f"by the owner of {key}"


def _no_key(key: Path, kind: str, reason: object) -> ForgetError:
    make = "openssl genpkey -algorithm ed25519 -out key.pem"
    if kind == "public":
        make = "openssl pkey -in key.pem -pubout -out public.pem"
    return ForgetError(f"{key} is no {kind} Ed25519 key in PEM ({reason}); make one with `{make}`")
