"""A signature is by one key of one receipt, and of nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from receipted import EVERYTHING, change, verified
from tiny import digests, refused, run

pytest_plugins = ["tiny", "receipted"]


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    key, private, public = Ed25519PrivateKey.generate(), folder / name, folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


def test_a_signature_is_by_one_key_of_one_receipt(receipted: Path) -> None:
    store = receipted / "store"
    (mine, public), (other, _) = keys(receipted, "mine"), keys(receipted, "other")
    check = ("--public-key", public)
    assert verified(receipted, 1, *check, code=3)["signature"] is False
    before = digests(store / "receipts")
    run("receipt", "sign", 1, "-s", store, "--key", mine)
    after = digests(store / "receipts")
    assert after.keys() - before.keys() == {"0001.sig", "0001.sig.sha256"}
    assert before.items() <= after.items()
    assert verified(receipted, 1, *check) == dict.fromkeys([*EVERYTHING, "signature"], True)
    shutil.copy(store / "receipts" / "0001.sig", store / "receipts" / "0002.sig")
    assert verified(receipted, 2, *check, code=3)["signature"] is False
    run("receipt", "sign", 1, "-s", store, "--key", other)
    assert verified(receipted, 1, *check, code=3)["signature"] is False


def test_keys_that_are_none_and_receipts_that_were_changed(receipted: Path) -> None:
    store, (mine, public) = receipted / "store", keys(receipted, "mine")
    elliptic = receipted / "elliptic"
    elliptic.write_bytes(
        generate_private_key(SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    for key in (public, elliptic, receipted / "gone"):
        said = refused("receipt", "sign", 1, "-s", store, "--key", key)
        assert said.startswith(f"{key} is no private Ed25519 key in PEM (")
        assert said.endswith("make one with `openssl genpkey -algorithm ed25519 -out key.pem`")
    said = refused("receipt", "verify", 1, "-s", store, "--public-key", mine)
    assert said.startswith(f"{mine} is no public Ed25519 key in PEM (")
    change(receipted, 1, "metrics")
    said = refused("receipt", "sign", 1, "-s", store, "--key", mine)
    assert said.startswith(
        "receipt 1 is not what the catalog says was written, so it is not signed"
    )
