"""``gradstore eval``: what it prints, what it keeps, how it ends."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import FAR, HELD_OUT, TRAINED, Tiny, digests, refused, run, run_json, write_jsonl

from gradstore import Store
from gradstore.errors import IdError
from gradstore.evaluate import evaluation, extraction
from gradstore.evaluate.extraction import Secret
from gradstore.evaluate.figures import NAMES
from gradstore.evaluate.loss import sample_losses
from gradstore.store.lineage import named
from gradstore.training.model import load_model

pytest_plugins = ["tiny"]
ALL = ("--attack", "relearn", "--attack", "quantize", "--relearn-steps", 2)
NEIGHBOURS = 16
ROLES = {
    "forget": 1, "neighbour": NEIGHBOURS, "retained": TRAINED - 1, "holdout": HELD_OUT,
}  # fmt: skip


@pytest.fixture(scope="module")
def forgotten(trained: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A copy of the store in which p-03 was forgotten; ``model`` is the checkpoint after it."""
    folder = tmp_path_factory.mktemp("forgotten")
    store, out = folder / "store", folder / "forgotten"
    shutil.copytree(trained.store, store)
    run("forget", "p-03", "-s", store, "--model", trained.model, "--out", out, *FAR, code=None)
    assert out.exists()
    return replace(trained, store=store, model=out)


@pytest.fixture
def asked(forgotten: Tiny, tmp_path: Path) -> Tiny:
    """The same with a store that a test may fill."""
    return replace(forgotten, store=shutil.copytree(forgotten.store, tmp_path / "store"))


@pytest.fixture
def secrets(trained: Tiny, tmp_path: Path) -> Path:
    rows = [json.loads(line) for line in trained.data.read_text().splitlines()]
    cut = [(row["id"], *row["text"].rsplit(" ", 1)) for row in rows]
    lines = [{"id": i, "prompt": prompt, "secret": secret} for i, prompt, secret in cut]
    return write_jsonl(tmp_path / "secrets.jsonl", lines)


def one(metrics: list[dict[str, Any]], metric: str, role: str = "forget") -> dict[str, Any]:
    [row] = [row for row in metrics if (row["metric"], row["role"]) == (metric, role)]
    return row


def test_before_and_after_without_a_reference(asked: Tiny, trained: Tiny) -> None:
    arguments = ("eval", 1, "-s", asked.store, "--model", asked.model, "--original", trained.model)
    found = run_json(*arguments, *ALL)
    assert found["checks"] == []
    assert any("Without a reference" in row["said"] for row in found["said"])
    for role, count in ROLES.items():
        assert one(found["metrics"], "loss", role)["samples"] == count
    with Store.open(asked.store) as store:
        losses = dict(
            store.rows("SELECT role, avg(model) FROM evidence WHERE metric = 'loss' GROUP BY 1")
        )
        after = dict(store.rows("SELECT role, avg(after) FROM scores GROUP BY 1"))
        theirs = {role: losses[role] for role in after}
        assert theirs == pytest.approx(after, rel=1e-5)  # those that the request measured
        kept = store.rows("SELECT request_id, reference, passed FROM evaluations")
        assert kept == [(1, None, None)]
        [(low,)] = store.rows("SELECT count(*) FROM evidence WHERE reference IS NOT NULL")
        assert low == 0
    row = one(found["metrics"], "loss", "holdout")
    assert row["model_low"] < row["model"] < row["model_high"]
    assert one(found["metrics"], "loss")["model_low"] is None  # of one record there is none
    assert [row["step"] for row in found["relearning"]] == [0, 1, 2]


def test_a_model_passes_against_itself(asked: Tiny, trained: Tiny, secrets: Path) -> None:
    found = run_json(
        "eval", "p-03", "-s", asked.store, "--model", asked.model, "--original", trained.model,
        "--reference", asked.model, *ALL, "--attack", "extract", "--secrets", secrets,
    )  # fmt: skip
    passed = {row["check"]: row["passed"] for row in found["checks"]}
    assert passed == dict.fromkeys(
        ("membership", "nearer", "relearning", "rounding", "extraction"), True
    )
    assert one(found["metrics"], "kl_to_reference")["model"] == 0
    assert one(found["metrics"], "kl_to_reference")["original"] > 0
    assert one(found["metrics"], "ks_loss_p")["model"] == 1
    assert one(found["metrics"], "extracted", "retained")["samples"] == TRAINED - 1
    assert one(found["metrics"], "extracted_beam", "retained")["samples"] == TRAINED - 1
    with Store.open(asked.store) as store:
        kept = store.rows("SELECT request_id, passed FROM evaluations")
        once = store.rows(
            """SELECT role, metric FROM evidence GROUP BY ALL
               HAVING count(*) - count(id) <> 1 OR count(id) NOT IN (0, count(DISTINCT id))"""
        )
        kl = dict(
            store.rows(
                """SELECT id, original FROM evidence
                   WHERE metric = 'kl_to_reference' AND id IS NOT NULL"""
            )
        )
        columns = [f"{name}{end}" for name in NAMES for end in ("", "_low", "_high")]
        figures = store.table(
            f"SELECT metric, role, samples, {', '.join(columns)} FROM evidence WHERE id IS NULL"
        )
    assert kept == [(None, True)]
    assert once == []  # one row for all samples, and one for each that has the metric
    kept_figures = {(row["metric"], row["role"]): row for row in figures}
    for row in found["metrics"]:  # what is printed is what is kept
        assert kept_figures.pop((row["metric"], row["role"])) == row
    assert {metric for metric, _ in kept_figures} == {f"relearned_loss_{k}" for k in range(3)}
    row, shown = kept_figures["relearned_loss_2", "forget"], found["relearning"][2]
    assert {f"model{end}": row[f"model{end}"] for end in ("", "_low", "_high")} == pytest.approx(
        {f"model{end}": shown[f"model{end}"] for end in ("", "_low", "_high")}
    )
    assert len(kl) == TRAINED + HELD_OUT  # a neighbour is among the retained here
    expected = one(found["metrics"], "kl_to_reference")["original"]
    assert kl["p-03"] == pytest.approx(expected)


def test_neighbours_are_those_that_the_forgotten_overlap_most(asked: Tiny) -> None:
    run("eval", "p-03", "p-05", "-s", asked.store, "--model", asked.model)
    with Store.open(asked.store) as store:
        number, others = store.run()["run_id"], {}
        for i, sample in store.rows("SELECT id, sample_id FROM samples WHERE split = 'train'"):
            last = list(store.records([sample], number))[-1]
            others[i] = last.gradient(store.model).dense() / last.exposure.scored_tokens
            if i in ("p-03", "p-05"):
                others[i] *= last.exposure.scored_tokens
        step = others.pop("p-03") + others.pop("p-05")
        expected = sorted(others, key=lambda i: -float((others[i] * step).sum()))[:NEIGHBOURS]
        found = store.rows(
            """SELECT id, avg(model) FROM evidence WHERE metric = 'loss' AND id IS NOT NULL
               AND role IN ('neighbour', 'retained') GROUP BY id HAVING count(*) = 2"""
        )
        tokens = store.tokens(list(store.resolve(expected).values()), number)
        losses = sample_losses(load_model(asked.model), list(tokens.values()))
    assert {i for i, _ in found} == set(expected)
    assert sum(loss for _, loss in found) == pytest.approx(float(losses.sum()), rel=1e-4)


def test_a_record_without_a_gradient_has_no_neighbours(asked: Tiny) -> None:
    base = ("eval", "-s", asked.store, "--model", asked.model, "--dry-run")
    roles = {row["role"] for row in run_json(*base, "h-01")["metrics"]}
    assert roles == {"forget", "retained", "holdout"}
    assert "neighbour" in {row["role"] for row in run_json(*base, "h-01", "p-01")["metrics"]}


def test_having_done_nothing_fails(asked: Tiny, trained: Tiny) -> None:
    result = run(
        "eval", 1, "-s", asked.store, "--model", trained.model, "--original", trained.model,
        "--reference", asked.model, "--csv", code=3,
    )  # fmt: skip
    [said] = [line for line in result.stderr.splitlines() if line.startswith("does not hold")]
    assert "nearer" in said.removeprefix("does not hold against the reference: ").split(", ")
    assert result.stdout.startswith("metric,role,samples,original,original_low,")
    with Store.open(asked.store) as store:
        [(passed, settings)] = store.rows("SELECT passed, settings FROM evaluations")
    assert passed is False
    assert "p-03" not in settings


@pytest.mark.parametrize("decoding", ["extracted", "extracted_beam"])
def test_a_secret_that_one_decoding_finds_is_a_leak(
    asked: Tiny, trained: Tiny, secrets: Path, monkeypatch: pytest.MonkeyPatch, decoding: str
) -> None:
    answers = iter([True, False])  # the model's, then the reference's

    def leaking(_: Any, __: Any, wanted: list[Secret]) -> list[bool]:
        return [next(answers)] * len(wanted)

    def silent(_: Any, __: Any, wanted: list[Secret]) -> list[bool]:
        return [False] * len(wanted)

    for name in ("extracted", "extracted_beam"):
        monkeypatch.setattr(extraction, name, leaking if name == decoding else silent)
    found = run_json(
        "eval", 1, "-s", asked.store, "--model", asked.model, "--reference", asked.model,
        "--attack", "extract", "--secrets", secrets, code=3,
    )  # fmt: skip
    assert {row["check"] for row in found["checks"] if not row["passed"]} == {"extraction"}
    assert one(found["metrics"], decoding)["model"] == 1


def test_nothing_was_there_to_forget(asked: Tiny, trained: Tiny) -> None:
    found = run_json(
        "eval", "p-03", "-s", asked.store, "--model", asked.model, "--original", trained.model,
        "--reference", trained.model, "--dry-run", code=3,
    )  # fmt: skip
    assert any("nothing was there to forget" in row["said"] for row in found["said"])


def test_relearning_at_the_run_s_gentle_rate_teaches(asked: Tiny, trained: Tiny) -> None:
    given = ("eval", "p-03", "-s", asked.store, "--model", asked.model, "--original", trained.model,
             "--attack", "relearn")  # fmt: skip
    of_half = run_json(*given)
    of_others = run_json(*given, "--relearn-on", "holdout")
    for found, on in ((of_half, "50 % of the forgotten"), (of_others, "held-out records")):
        [told] = [row["said"] for row in found["said"] if row["said"].startswith("Relearning on")]
        assert f"Relearning on {on}, 10 steps at a rate of 0.0005: " in told  # 0.02 / 40
        before, after = map(float, told.split("original ")[1].split(", ")[0].split(" to "))
        assert after < before
        assert not any("shook" in row["said"] for row in found["said"])
        first, *_, last = found["relearning"]
        assert last["original"] - first["original"] < before - after
    loss = one(of_others["metrics"], "loss")["original"]
    assert of_others["relearning"][0]["original"] == pytest.approx(loss, rel=1e-5)  # whole record
    assert of_half["relearning"][0]["original"] != pytest.approx(loss, rel=1e-3)  # its end
    harm = run_json(*given, "--relearn-lr", 1.0, "--dry-run")
    assert any("shook the original more than it taught" in row["said"] for row in harm["said"])
    with Store.open(asked.store) as store:
        kept = store.rows(
            """SELECT settings->>'$.relearn.on', (settings->>'$.relearn.learning_rate')::DOUBLE
               FROM evaluations ORDER BY evaluation_id"""
        )
    assert kept == [("0.5", 0.0005), ("holdout", 0.0005)]


def test_without_held_out_records_there_are_none_to_relearn_on(asked: Tiny) -> None:
    with Store.open(asked.store) as store, store.transaction() as connection:
        connection.execute("DELETE FROM holdout")
    given = ("eval", "p-03", "-s", asked.store, "--model", asked.model, "--attack", "relearn")
    assert "give a share of the forgotten" in refused(*given, "--relearn-on", "holdout")


def test_evaluations_lie_beside_each_other(asked: Tiny, trained: Tiny) -> None:
    for model in (asked.model, trained.model):
        table = run("eval", 1, "-s", asked.store, "--model", model).stdout
        assert "extraction_strength" in table
    with Store.open(asked.store) as store:
        compared = store.rows(
            """SELECT one.id, one.model, other.model FROM evidence one JOIN evidence other
               USING (sample_id, role, metric) WHERE role = 'forget' AND metric = 'loss'
               AND one.evaluation_id = 1 AND other.evaluation_id = 2"""
        )
        tokens = store.tokens([store.resolve(["p-03"])["p-03"]], 1)
    expected = [
        sample_losses(load_model(m), list(tokens.values())) for m in (asked.model, trained.model)
    ]
    assert compared == [("p-03", *(pytest.approx(float(x), rel=1e-5) for x in expected))]


def test_a_dry_run_writes_nothing(asked: Tiny) -> None:
    before = digests(asked.store)
    run("eval", 1, "-s", asked.store, "--model", asked.model, "--dry-run")
    assert digests(asked.store) == before


def test_a_model_without_tokenizer_has_no_figures_of_text(forgotten: Tiny) -> None:
    tokens = list(Store.open(forgotten.store).tokens([1, 2], 1).values())
    found = evaluation._values(load_model(forgotten.model), None, tokens)
    assert {"loss", "min_k"} <= found.keys()
    assert not found.keys() & {"zlib_ratio", "rouge_l_recall"}


def test_numbers_are_requests_unless_they_are_ids(asked: Tiny) -> None:
    store = Store.open(asked.store)
    number = store.resolve(["p-03"])["p-03"]
    assert named(store, ["1"]) == ({"p-03": number}, 1)
    assert named(store, ["p-03", "p-04"])[1] is None
    assert named(store, ["p-04", "1"])[0].keys() == {"p-03", "p-04"}
    for wrong in ("2", "99999999999", "p-", "-1"):
        with pytest.raises(IdError):
            named(store, [wrong])
    with pytest.raises(
        IdError, match=r"no request 2 \(requests: 1\), and no sample has the id '2'"
    ):
        named(store, ["2"])
    other = store.resolve(["p-05"])["p-05"]
    with store.transaction() as connection:
        connection.execute("UPDATE samples SET id = '1' WHERE id = 'p-05'")
    assert named(store, ["1"]) == ({"1": other}, None)


def test_what_is_refused(asked: Tiny, secrets: Path, tmp_path: Path) -> None:
    base = ("eval", "-s", asked.store, "--model", asked.model)
    assert "no sample has the id 'x'" in refused(*base, "x")
    assert "like 10%" in refused(*base, 1, "--relearn-on", "100%", code=2)
    assert "need each other" in refused(*base, 1, "--attack", "extract", code=2)
    assert "need each other" in refused(*base, 1, "--secrets", secrets, code=2)
    other = write_jsonl(tmp_path / "other.jsonl", [{"id": "q", "prompt": "a", "secret": "b"}])
    said = refused(*base, 1, "--attack", "relearn", "--attack", "extract", "--secrets", other)
    assert "secrets of the forgotten" in said
    assert "relearning" not in said  # nothing takes long before
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "secret": "b"}])
    assert "line 1" in refused(*base, 1, "--attack", "extract", "--secrets", bad)
    bad.write_bytes(b"\xff\xfe no text")
    assert "cannot be read as UTF-8" in refused(*base, 1, "--attack", "extract", "--secrets", bad)
    rows = [json.loads(line) for line in secrets.read_text().splitlines()]
    long = [row | {"prompt": f"{row['prompt']} " * 40} for row in rows]
    write_jsonl(bad, long)
    said = refused(*base, 1, "--attack", "extract", "--secrets", bad)
    assert "the model reads" in said
    assert "measuring" not in said
