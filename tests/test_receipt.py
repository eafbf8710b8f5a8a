"""A receipt says what a request did, in its schema; whatever is changed afterwards is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from receipted import EVERYTHING, change, document, flip, validator, verified
from safetensors.torch import load_file
from test_startup import HEAVY, imported_by
from tiny import FAR, Tiny, counts, refused, run

from gradstore import Store
from gradstore.errors import IdError
from gradstore.identity import digest_checkpoint
from gradstore.store import database
from gradstore.unlearn import receipt as receipts
from gradstore.unlearn.forget import ForgetSettings, forget
from gradstore.unlearn.update import pack
from gradstore.unlearn.verify import verify

pytest_plugins = ["tiny", "receipted"]


# -- the document --------------------------------------------------------------------------------


def test_receipts_follow_their_schema_and_name_the_one_before(three: Tiny) -> None:
    previous = None
    for number in (1, 2, 3):
        receipt = document(three.store.parent, number)
        validator().validate(receipt)
        assert (receipt["request"], receipt["audit"]) == (number, {"previous": previous})
        canonical = json.dumps(receipt, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        previous = sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("audit"),
        lambda r: r.update(note="p-07"),
        lambda r: r["ids"].append("p-07"),
        lambda r: r["target"].pop("reference"),
        lambda r: r["metrics"][0].update(interval=[1.0]),
        lambda r: r.update(verdict="refused"),
        lambda r: r["model"].update(after=None),
        lambda r: r.update(update=None),
        lambda r: r["method"].update(dose=None),
        lambda r: r["method"].update(direction="exact"),
        lambda r: r["method"]["settings"].pop("weights"),
    ],
)
def test_the_schema_refuses_other_documents(
    change: Callable[[dict[str, Any]], None], three: Tiny
) -> None:
    receipt = document(three.store.parent, 1)
    change(receipt)
    assert not validator().is_valid(receipt)


def test_a_receipt_says_what_the_catalog_does(three: Tiny) -> None:
    store, receipt = Store.open(three.store), document(three.store.parent, 1)
    [request] = store.table("SELECT * FROM requests WHERE request_id = 1")
    assert receipt["time"] == request["created_at"].isoformat()[:19] + "Z"
    assert receipt["method"] == {
        "direction": "newton",
        "dose": 4.0,
        "dose_asked": "4",
        "max_holdout_increase": 9.0,
        "max_retained_increase": None,
        "settings": {
            name: value for name, value in json.loads(request["settings"]).items()
            if name != "notes"
        },
    }  # fmt: skip
    assert receipt["method"]["settings"]["weights"] == "held"
    assert (receipt["run"], receipt["verdict"]) == ("run-1", request["verdict"])
    assert receipt["target"] == {
        "loss": request["target"],
        "range": [request["target_low"], request["target_high"]],
        "reference": "estimate from undoing the optimizer's steps",
    }
    assert document(three.store.parent, 3)["target"] == {
        "loss": 8.0,
        "range": [8.0, None],
        "reference": "asked target",
    }
    folder = three.store.parent
    assert receipt["model"]["before"] == digest_checkpoint(folder / "trained")
    assert receipt["model"]["after"] == digest_checkpoint(folder / "out-1")
    assert receipt["versions"]["torch"] == torch.__version__
    rows = store.rows(
        "SELECT role, metric, samples, before, after, change FROM collateral WHERE request_id = 1"
    )
    found = {m["role"]: m for m in receipt["metrics"]}
    assert [m["role"] for m in receipt["metrics"]] == ["forget", "holdout", "retained"]
    assert len(rows) == 3
    for role, metric, samples, before, after, risen in rows:
        summary = found[role]
        assert (summary["metric"], summary["count"]) == (metric, samples)
        values = [summary[name] for name in ("before", "after", "change")]
        assert values == pytest.approx([before, after, risen])
        low, high = summary["interval"]
        assert low < summary["change"] < high


def test_the_interval_is_that_of_a_mean(three: Tiny) -> None:
    store, receipt = Store.open(three.store), document(three.store.parent, 1)
    [(spread, count)] = store.rows(
        """SELECT stddev_pop(after - before), count(*) FROM scores
           WHERE request_id = 1 AND role = 'retained'"""
    )
    [retained] = [m for m in receipt["metrics"] if m["role"] == "retained"]
    low, high = retained["interval"]
    assert high - low == pytest.approx(2 * 1.96 * spread / count**0.5, rel=0.15)
    [alone] = [m for m in document(three.store.parent, 2)["metrics"] if m["role"] == "forget"]
    assert (alone["count"], alone["interval"]) == (1, None)


def test_ids_are_named_by_salted_hashes_only(three: Tiny) -> None:
    text = json.dumps(document(three.store.parent, 1))
    salt = json.loads((three.store / "gradstore.json").read_text())["store"]
    expected = sorted(sha256(f"{salt}\n{i}".encode()).hexdigest() for i in ("p-07", "p-02"))
    assert json.loads(text)["ids"] == expected
    secrets = ("p-07", "p-02", salt, sha256(b"p-07").hexdigest(), str(three.store.parent))
    assert not [secret for secret in secrets if secret in text]


def test_what_is_stored_is_what_was_added(three: Tiny) -> None:
    folder, name = three.store.parent, "transformer.wte.weight"
    old, new = (
        load_file(folder / model / "model.safetensors")[name] for model in ("trained", "out-1")
    )
    update = load_file(three.store / "receipts" / "0001.safetensors")["embedding"]
    assert torch.equal(old.add(update, alpha=document(folder, 1)["method"]["dose"]), new)


# -- verification --------------------------------------------------------------------------------


def test_receipts_hold(receipted: Path) -> None:
    for number in (1, 2, 3):
        assert verified(receipted, number) == dict.fromkeys(EVERYTHING, True)


def test_the_models_are_those_of_the_catalog_unless_given(three: Tiny) -> None:
    result = run("receipt", "verify", 2, "-s", three.store)
    assert result.stderr == "receipt 2 holds\n"
    wrong = three.store.parent / "out-3"
    result = run("receipt", "verify", 2, "-s", three.store, "--model-out", wrong, code=3)
    assert result.stderr == "receipt 2 does not hold: model after\n"


@pytest.mark.parametrize(
    ("damage", "failed"),
    [
        (lambda f: flip(f / "out-2" / "model.safetensors"), {"model after"}),
        (lambda f: flip(f / "out-1" / "model.safetensors"), {"model before", "recomputed"}),
        (lambda f: flip(f / "store/receipts/0002.safetensors"), {"update", "recomputed"}),
        (lambda f: (f / "store/receipts/0002.safetensors").unlink(), {"update", "recomputed"}),
        (lambda f: shutil.rmtree(f / "out-1"), {"model before", "recomputed"}),
        (lambda f: shutil.rmtree(f / "out-2"), {"model after"}),
        (lambda f: change(f, 2, "metrics"), {"document", "chain"}),
        (lambda f: change(f, 2, "dose"), {"document", "chain", "recomputed"}),
        (lambda f: change(f, 1, "metrics"), {"chain"}),
        (lambda f: (f / "store/receipts/0001.json").unlink(), {"chain"}),
        (lambda f: (f / "store/receipts/0003.json").unlink(), {"chain"}),
        (lambda f: drop(f, 1), {"chain"}),
    ],
    ids=[
        "after", "before", "update", "update gone", "before gone", "after gone", "number", "dose",
        "other number", "first gone", "last gone", "first gone from the catalog too",
    ],
)  # fmt: skip
def test_whatever_is_changed_is_found(
    damage: Callable[[Path], None], failed: set[str], receipted: Path
) -> None:
    damage(receipted)
    found = verified(receipted, 2, code=3)
    assert {name for name, passed in found.items() if not passed} == failed


def drop(folder: Path, number: int) -> None:
    """Remove a receipt without a trace in the catalog."""
    store = Store.open(folder / "store")
    with store.transaction() as connection:
        connection.execute("DELETE FROM receipts WHERE request_id = ?", [number])
    receipts.path_of(store, number).unlink()


def test_white_space_is_no_change(receipted: Path) -> None:
    path = receipted / "store" / "receipts" / "0002.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=4, sort_keys=True))
    assert all(verified(receipted, 2).values())


def test_a_checkpoint_another_update_made_is_not_recomputed(receipted: Path) -> None:
    """A consistent forgery of document, catalog and update still has to make the checkpoint."""
    store = Store.open(receipted / "store")
    update = load_file(receipts.path_of(store, 3, "safetensors"))["embedding"]
    forged = pack({"embedding": update * 1.001})
    receipts.put(receipts.path_of(store, 3, "safetensors"), forged)
    receipt = receipts.read(store, 3) | {"update": sha256(forged).hexdigest()}
    receipts.put(receipts.path_of(store, 3), json.dumps(receipt).encode())
    with store.transaction() as connection:
        connection.execute(
            "UPDATE receipts SET digest = ? WHERE request_id = 3", [receipts.digest_of(receipt)]
        )
    found = verified(receipted, 3, code=3)
    assert found == dict.fromkeys(EVERYTHING, True) | {"recomputed": False}


# -- what has no receipt, or a broken one ---------------------------------------------------------


def test_only_a_written_checkpoint_has_a_receipt(copied: Tiny, tmp_path: Path) -> None:
    base = ["forget", "p-07", "-s", copied.store, "--model", copied.model, "--out"]
    run(*base, tmp_path / "dry", *FAR, "--dry-run", code=None)
    assert not (copied.store / "receipts").exists()
    run(*base, tmp_path / "none", "--dose", "target:0.001", code=3)
    assert not (copied.store / "receipts").exists()
    said = refused("receipt", "show", 1, "-s", copied.store)
    assert said.startswith("request 1 has no receipt: only one that wrote a checkpoint has; ")
    assert "requests with one: none yet (`gradstore sql" in said
    run(*base, tmp_path / "done", *FAR, code=None)
    assert sorted(p.name for p in (copied.store / "receipts").iterdir()) == [
        "0002.json", "0002.safetensors"
    ]  # fmt: skip
    assert document(copied.store.parent, 2)["audit"] == {"previous": None}


def test_a_request_whose_receipt_cannot_be_written_leaves_nothing(
    copied: Tiny, tmp_path: Path
) -> None:
    before = counts(copied.store)
    (copied.store / "receipts").write_text("in the way")
    said = refused(
        "forget",
        "p-07",
        "-s",
        copied.store,
        "--model",
        copied.model,
        "--out",
        tmp_path / "out",
        *FAR,
    )
    assert said.startswith(f"cannot write {copied.store / 'receipts'}")
    assert not (tmp_path / "out").exists()
    assert counts(copied.store) == before


def test_a_receipt_that_a_crash_left_is_replaced(
    copied: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    store, settings = Store.open(copied.store), ForgetSettings(dose="1", max_holdout_increase=None)
    with monkeypatch.context() as patch:
        patch.setattr(receipts, "insert", crash)
        with pytest.raises(KeyboardInterrupt):
            forget(store, ["p-07"], copied.model, tmp_path / "first", settings)
    assert receipts.path_of(store, 1).exists()
    assert receipts.digests(store) == {}
    with pytest.raises(IdError, match="request 1 has no receipt"):
        receipts.read(store, 1)
    forget(store, ["p-03"], copied.model, tmp_path / "second", settings)
    assert receipts.read(store, 1)["ids"] == [receipts.hash_id(store, "p-03")]
    assert all(check.passed for check in verify(store, 1))
    assert not list((copied.store / "receipts").glob(".tmp-*"))


def test_errors_say_what_to_do(receipted: Path) -> None:
    store = receipted / "store"
    assert "requests with one: 1, 2, 3 " in refused("receipt", "verify", 4, "-s", store)
    run("receipt", "show", 0, "-s", store, code=2)
    path = store / "receipts" / "0002.json"
    for text in ("", "[1]", '{"format": NaN}', "{}"):
        path.write_text(text)
        said = refused("receipt", "verify", 2, "-s", store)
        assert said.startswith(f"{path} is no receipt (")


def test_a_store_from_before_there_were_receipts(
    trained: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = tmp_path / "schemas"
    older.mkdir()
    for name in ("0001_catalog.sql", "0002_matches.sql"):
        shutil.copy(str(files("gradstore.schemas") / name), older)
    monkeypatch.setattr(database, "files", lambda _: older)
    store = Store.create(tmp_path / "store")
    with store.transaction():
        pass
    assert receipts.digests(Store.open(store.root)) == {}


def test_showing_a_receipt_needs_no_torch(three: Tiny) -> None:
    assert not imported_by("receipt", "show", "1", "-s", str(three.store)) & HEAVY
