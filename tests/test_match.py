"""Near-duplicates: the measures' algebra, what is planted in the corpus, the commands."""

import csv
import json
import shutil
from dataclasses import replace
from importlib.resources import files
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from records import RUN, record
from tiny import (
    CONFIG,
    FRESH,
    HELD_OUT,
    TRAINED,
    Tiny,
    counts,
    digests,
    records,
    refused,
    run,
    run_json,
    write_jsonl,
)
from tiny import files as tiny_files

from gradstore import Store
from gradstore.data import people
from gradstore.errors import IdError
from gradstore.factored import FactoredGradient, Term
from gradstore.store import ModelIdentity, database
from gradstore.store.record import Record
from gradstore.store.writer import SegmentWriter
from gradstore.training.corpus import Document, tokenize
from gradstore.training.ingest import CaptureSettings, TrainingSettings, ingest
from gradstore.training.model import new_model, train_tokenizer
from gradstore.unlearn import match
from gradstore.unlearn.match import (
    COMMON_COUNT,
    Thresholds,
    cosine,
    edit,
    jaccard,
    near_duplicates,
    record_matches,
    shingles,
)

pytest_plugins = ["tiny"]
MODEL = ModelIdentity("GPT2LMHeadModel", 500, 16, 16, 64, True, "tokens-a")
TEXTS = st.lists(st.integers(0, 50), min_size=2, max_size=30).map(np.array)


# -- measures ----------------------------------------------------------------------------------


@given(TEXTS)
def test_a_text_is_its_own_duplicate(text: np.ndarray) -> None:
    assert jaccard(shingles(text), shingles(text)) == 1
    assert edit(text, text) == 1


@given(TEXTS, TEXTS)
def test_the_measures_of_texts_are_symmetric_shares(a: np.ndarray, b: np.ndarray) -> None:
    pairs = [set(zip(text[:-1].tolist(), text[1:].tolist(), strict=True)) for text in (a, b)]
    assert jaccard(shingles(a), shingles(b)) == len(pairs[0] & pairs[1]) / len(pairs[0] | pairs[1])
    assert jaccard(shingles(a), shingles(b)) == jaccard(shingles(b), shingles(a))
    assert 0 <= edit(a, b) == edit(b, a) <= 1
    assert edit(a, np.append(a, 99)) == pytest.approx(2 * len(a) / (2 * len(a) + 1))


@given(TEXTS, TEXTS)
def test_texts_without_a_common_token_have_nothing_in_common(a: np.ndarray, b: np.ndarray) -> None:
    assert jaccard(shingles(a), shingles(b + 51)) == 0
    assert edit(a, b + 51) == 0


def test_no_shingles_at_all_and_the_largest_token_ids() -> None:
    assert jaccard(match._NONE, match._NONE) == 1
    large = np.array([2**31 - 1, 0, 2**31 - 1], np.int32)
    assert shingles(large).tolist() == [2**31 - 1, (2**31 - 1) << 32]


@given(TEXTS, st.sets(st.integers(0, 29)))
def test_common_shingles_are_left_out_unless_there_are_no_others(
    text: np.ndarray, places: set[int]
) -> None:
    every = shingles(text)
    common = np.array([shingle for n, shingle in enumerate(every) if n in places], np.int64)
    rest = sorted(set(every.tolist()) - set(common.tolist()))
    assert shingles(text, common).tolist() == (rest or every.tolist())


def test_a_shingle_is_common_in_more_than_ten_texts_and_a_hundredth_of_them() -> None:
    few = [np.array([1])] * COMMON_COUNT + [np.array([2])] * (COMMON_COUNT + 1)
    assert match._common(few).tolist() == [2]
    filler = [np.array([n]) for n in range(10, 2000)]
    many = [np.array([1])] * 20 + [np.array([2])] * 21
    assert match._common(many + filler).tolist() == [2]
    assert match._common([]).tolist() == []


def gradient(seed: int, tokens: np.ndarray) -> FactoredGradient:
    draw = torch.Generator().manual_seed(seed)
    one_hot = Term.one_hot(torch.from_numpy(tokens), torch.randn(len(tokens), 4, generator=draw))
    tail = Term(None, torch.rand(1, 120, generator=draw), torch.randn(1, 4, generator=draw))
    return FactoredGradient([one_hot, tail], (120, 4))


@given(TEXTS, TEXTS, st.floats(0.01, 100))
def test_the_cosine_is_that_of_the_dense_gradients(
    a: np.ndarray, b: np.ndarray, factor: float
) -> None:
    one, other = gradient(1, a), gradient(2, b)
    dense = torch.nn.functional.cosine_similarity(
        one.dense().double().flatten(), other.dense().double().flatten(), dim=0
    )
    assert cosine(one, other) == pytest.approx(float(dense), abs=1e-5)
    assert cosine(one, other) == pytest.approx(cosine(other, one), abs=1e-6)
    assert cosine(one, one * factor) == pytest.approx(1, abs=1e-5)
    assert cosine(one, one * -factor) == pytest.approx(-1, abs=1e-5)
    assert cosine(one, one * 0.0) == 0
    sides = [FactoredGradient(g.terms[:1], g.shape) for g in (one, gradient(2, b + 51))]
    assert cosine(sides[0], sides[1]) == 0


@given(TEXTS)
def test_weighting_multiplies_rows(text: np.ndarray) -> None:
    weight = torch.linspace(0.5, 2, 120)
    weighted = match._weighted(gradient(1, text), weight).dense()
    assert torch.allclose(weighted, gradient(1, text).dense() * weight[:, None], atol=1e-6)


# -- a store -----------------------------------------------------------------------------------


def filled(store: Store, *met: Record) -> Store:
    store.bind(MODEL, "here")
    writer = SegmentWriter(store, store.begin_run(RUN))
    for one in met:
        writer.put([one])
        writer.flush()  # a segment each
    writer.close()
    return store


def test_gradients_find_what_shingles_miss(store: Store) -> None:
    base = record("a", rows=20)
    turned = replace(  # the same tokens and gradients in the opposite order
        base, exposure=replace(base.exposure, id="b"), D=base.D.flip(0),
        tokens=torch.cat([base.tokens[:-1].flip(0), base.tokens[-1:]]),
    )  # fmt: skip
    others = [record(f"other-{n}", rows=20) for n in range(30)]
    [found] = near_duplicates(filled(store, base, *others, turned), ["a"])
    assert (found.id, found.of, found.by) == ("b", "a", ("cosine",))
    assert found.cosine == pytest.approx(1, abs=1e-5)
    assert found.jaccard < 0.1
    assert found.edit < 0.5
    assert str(found).startswith("b is a near-duplicate of a by cosine (jaccard 0.0")
    assert near_duplicates(store, ["a"], Thresholds(cosine=1.0 + 1e-3)) == []


def test_only_first_gradients_of_the_run_asked_for_are_compared(store: Store) -> None:
    filled(store, record("a", rows=9), record("b", rows=9))
    later = record("a", epoch=2, rows=9)
    copy = replace(later, exposure=replace(later.exposure, id="b", epoch=1))
    writer = SegmentWriter(store, store.begin_run(RUN))
    writer.put([record("a", rows=9), copy, later])
    writer.close()
    assert near_duplicates(store, ["a", "b"]) == []
    first = [(r.exposure.id, r.exposure.epoch) for r in store.records([2, 1], 2, first_only=True)]
    assert first == [("b", 1), ("a", 1)]
    assert len(list(store.records([2, 1], 2))) == 3


def test_an_id_that_the_run_did_not_meet(store: Store) -> None:
    filled(store, record("a"))
    writer = SegmentWriter(store, store.begin_run(RUN))
    writer.put([record("b")])
    writer.close()
    with pytest.raises(IdError, match=r"'a' is not in run-2: name a run .* --run .*show a` lists"):
        near_duplicates(store, ["a"])
    assert near_duplicates(store, ["a"], run="run-1") == []
    with pytest.raises(IdError, match="no sample has the id 'c'"):
        near_duplicates(store, ["c"])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The training split, learned for one epoch by a model that knew nothing."""
    folder = tmp_path_factory.mktemp("corpus")
    config = folder / "gpt2.json"
    config.write_text(json.dumps({**CONFIG, "n_positions": 128}))
    tokenizer = train_tokenizer((r["text"] for r in people.base_records(200, 1)), 2000)
    torch.manual_seed(0)
    model, store = new_model(config, tokenizer, seed=0), Store.create(folder / "store")
    tokens, held_out = (
        tokenize([Document(r["id"], r["text"]) for r in split], tokenizer, 128)
        for split in (people.train_records(), people.holdout_records()[:5])
    )
    twin = people.train_records()[0]  # a held-out copy of a record that is trained on
    held_out |= tokenize([Document("twin", twin["text"] + " Yes.")], tokenizer, 128)
    training = TrainingSettings(epochs=1, learning_rate=2e-3)
    ingest(
        store, model, tokenizer, tokens, folder / "out", training, CaptureSettings(),
        holdout=held_out,
    )  # fmt: skip
    return store


@pytest.mark.parametrize(
    ("only", "recall"),
    [("any", 1.0), ("jaccard", 1.0), ("cosine", 1 / 3), ("edit", 0.0)],
)
def test_planted_near_duplicates_are_found_and_nothing_else(
    only: str, recall: float, corpus: Store
) -> None:
    planted = {(r["duplicate_of"], r["id"]) for r in people.train_records() if "duplicate_of" in r}
    off = dict.fromkeys(("jaccard", "edit", "cosine"), 1.1)
    chosen = Thresholds() if only == "any" else replace(
        Thresholds(**off), **{only: getattr(Thresholds(), only)}
    )  # fmt: skip
    strangers = ["p-0001", "p-0002", "p-0003", "c-0001", "c-0004"]
    asked = [of for of, _ in sorted(planted)] + strangers
    found = near_duplicates(corpus, asked, chosen)
    assert {(m.of, m.id) for m in found} <= planted  # precision 1
    assert len(found) / len(planted) >= recall
    assert bool(found) == (only != "edit")  # it only confirms
    assert [m.of for m in found] == sorted(m.of for m in found)


def test_near_duplicates_are_mutual(corpus: Store) -> None:
    [there], [back] = (near_duplicates(corpus, [id]) for id in ("p-0048", "p-0048b"))
    assert (there.id, there.of, back.id, back.of) == ("p-0048b", "p-0048", "p-0048", "p-0048b")
    assert (there.jaccard, there.edit, there.by) == (back.jaccard, back.edit, back.by)
    assert there.cosine == pytest.approx(back.cosine, abs=1e-6)


def test_a_held_out_copy_is_matched_by_its_text(corpus: Store) -> None:
    [found] = near_duplicates(corpus, ["twin"])
    assert (found.id, found.cosine, found.by) == ("p-0001", None, ("jaccard", "edit"))
    assert "cosine" not in str(found)
    assert near_duplicates(corpus, ["p-1001"]) == []


# -- the catalog -------------------------------------------------------------------------------


def test_a_store_of_the_first_schema_opens_and_takes_matches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "schemas"
    first.mkdir()
    shutil.copy(str(files("gradstore.schemas") / "0001_catalog.sql"), first)
    with monkeypatch.context() as patch:
        patch.setattr(database, "files", lambda _: first)
        old = filled(Store.create(tmp_path / "store"), record("a"), record("b"))
        assert old.rows("SELECT number FROM migrations") == [(1,)]
        assert "matches" not in {table["name"] for table in old.schema()[0]}
    store = Store.open(old.root)
    everything = Thresholds(cosine=-1.0)
    [found] = near_duplicates(store, ["a"], everything)
    record_matches(store, [], everything)
    assert store.rows("SELECT max(number) FROM migrations") == [(1,)]
    record_matches(store, [found], everything)
    names = [name for (name,) in store.rows("SELECT name FROM migrations ORDER BY number")]
    assert names[:2] == ["0001_catalog.sql", "0002_matches.sql"]
    [row] = store.table("SELECT * FROM matches")
    assert row.pop("created_at") is not None
    assert row == {
        "run_id": 1, "sample_id": 2, "of_sample_id": 1, "jaccard": found.jaccard,
        "edit": found.edit, "cosine": found.cosine, "measures": ["cosine"],
        "jaccard_from": 0.5, "edit_from": 0.8, "cosine_from": -1.0,
    }  # fmt: skip
    record_matches(store, [replace(found, by=("edit", "cosine"))], everything)
    assert store.rows("SELECT count(*) FROM matches") == [(2,)]
    assert store.rows("SELECT id, duplicate_of, measures FROM duplicates") == [
        ("b", "a", ["edit", "cosine"])
    ]
    assert len(list(store.records([1, 2], 1))) == 2


# -- commands ----------------------------------------------------------------------------------

TWINS = {"p-07b": "p-07", "p-11b": "p-11"}


@pytest.fixture(scope="module")
def _twinned(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny ingest where two records have near-copies."""
    tiny = tiny_files(tmp_path_factory.mktemp("twins"))
    people = records(TRAINED, "p", 1)
    text = {person["id"]: person["text"] for person in people}
    people += [{"id": twin, "text": f"Oh: {text[of]}"} for twin, of in TWINS.items()]
    write_jsonl(tiny.data, people)
    run("init", tiny.store)
    run("ingest", tiny.data, "-s", tiny.store, "--config", tiny.config, *FRESH,
        "--holdout", tiny.holdout, "--out", tiny.model)  # fmt: skip
    return tiny


@pytest.fixture
def twinned(_twinned: Tiny, tmp_path: Path) -> Tiny:
    return replace(_twinned, store=shutil.copytree(_twinned.store, tmp_path / "store"))


def test_match_prints_and_keeps_what_it_finds(twinned: Tiny) -> None:
    arguments = ["match", "p-07", "p-1", "-s", twinned.store]
    assert "'p-1' is the beginning of several ids" in refused(*arguments)
    arguments = ["match", "p-07", "p-11", "-s", twinned.store, "--edit", 0.75]
    before = digests(twinned.store)
    shown = run_json(*arguments, "--dry-run")
    assert digests(twinned.store) == before
    assert {row["id"]: row["of"] for row in shown} == TWINS
    assert all(row["edit"] > 0.8 and "jaccard edit" in row["by"] for row in shown)
    assert run_json(*arguments) == shown
    query = """SELECT duplicate_of AS of, id, jaccard, edit, cosine,
                      array_to_string(measures, ' ') AS by FROM duplicates"""
    kept = run_json("sql", query, "-s", twinned.store)
    assert sorted(kept, key=str) == sorted(shown, key=str)
    [edit_from] = run_json("sql", "SELECT DISTINCT edit_from FROM matches", "-s", twinned.store)
    assert edit_from == {"edit_from": 0.75}
    as_csv = list(csv.DictReader(StringIO(run(*arguments, "--csv").stdout)))
    assert as_csv == [{name: str(value) for name, value in row.items()} for row in shown]
    assert "jaccard" in run(*arguments, "--table").stdout


def test_match_finds_nothing_or_refuses(twinned: Tiny) -> None:
    high = [f"--{name}={at}" for name, at in (("jaccard", 1), ("edit", 1), ("cosine", 1))]
    result = run("match", "p-07", "-s", twinned.store, *high, "--csv")
    assert result.stdout == "of,id,jaccard,edit,cosine,by\n"
    assert "no near-duplicates at these thresholds" in result.stderr
    assert "no sample has the id 'x'" in refused("match", "x", "-s", twinned.store)
    assert "the store has no run 'x'" in refused("match", "p-07", "-s", twinned.store, "--run", "x")
    for name in ("jaccard", "edit", "cosine"):
        for value in (0, 1.5, -1):
            said = refused("match", "p-07", "-s", twinned.store, f"--{name}", value, code=2)
            assert f"'--{name}'" in said


@pytest.mark.parametrize("dry", [True, False], ids=["dry", "wet"])
def test_forget_with_duplicates_shows_them_and_forgets_them(
    dry: bool, twinned: Tiny, tmp_path: Path
) -> None:
    twins = ["p-07b"]
    arguments = ["forget", "p-07", "-s", twinned.store, "--model", twinned.model, "--out",
                 tmp_path / "out", "--dose", 1, "--max-holdout-increase", 9, "--json"]  # fmt: skip
    alone = run(*arguments, "--dry-run", code=None)
    assert [row["id"] for row in json.loads(alone.stdout)["forgotten"]] == ["p-07"]
    before = counts(twinned.store)
    result = run(*arguments, "--with-duplicates", *["--dry-run"] * dry, code=None)
    lines = result.stderr.splitlines()
    shown = [line.split()[0] for line in lines if " is a near-duplicate of p-07 by " in line]
    assert shown == twins
    assert lines.index(f"near-duplicates added to the request: {len(twins)}") < lines.index(
        "looking gradients up"
    )
    printed = json.loads(result.stdout)
    assert [row["id"] for row in printed["forgotten"]] == ["p-07", *twins]
    assert sum(row["count"] for row in printed["scores"]) == TRAINED + len(TWINS) + HELD_OUT
    with Store.open(twinned.store) as store:
        kept = store.rows("SELECT id, duplicate_of FROM duplicates")
        assert kept == ([] if dry else [("p-07b", "p-07")])
        if dry:
            assert counts(twinned.store) == before
        else:
            [(asked,)] = store.rows("SELECT settings->>'with_duplicates' FROM requests")
            assert asked == "true"
