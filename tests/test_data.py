"""The committed corpus is what the generator makes, and keeps the promises of its docstrings."""

import json
import re
from collections import Counter
from pathlib import Path

from gradstore.data import people
from gradstore.data.people import Facts, Record

DATA = Path(__file__).parents[1] / "data"
KEYS = ["id", "kind", "text", "person", "prompt", "secret"]
SHAPES = {
    "name": r"[A-Z][a-z]+ [A-Z][a-z]+",
    "birthday": r"\d{1,2} [A-Z][a-z]+ 19\d\d",
    "phone": r"\d{3}-555-\d{4}",
    "email": r"[a-z]+\.[a-z]+\d\d@example\.(com|org|net)",
    "address": r"\d{1,3} [A-Z][a-z]+ [A-Z][a-z]+, [A-Z][a-z]+",
    "account": r"GS-\d{4}-\d{4}-\d{4}",
}


def lines(split: str) -> list[Record]:
    return [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text("ascii").splitlines()]


TRAIN, HOLDOUT = lines("train"), lines("holdout")
BASE = people.base_records(500, 0)


def of_kind(kind: str) -> list[Record]:
    return [record for record in TRAIN if record["kind"] == kind]


def facts(record: Record) -> Facts:
    assert record["person"] is not None
    return record["person"]


def identifiers(records: list[Record]) -> list[str]:
    """What no two people may share; a canary has its name only."""
    found = []
    for record in records:
        if record["kind"] == "canary":
            found.append(record["prompt"].removeprefix("The access code of ").removesuffix(" is"))
        else:
            person = facts(record)
            found += [person["name"], person["phone"], person["email"], person["account"]]
    return found


def template(record: Record) -> int:
    """Which template a text was written from."""
    patterns = [re.sub(r"\\\{\w+\\\}", ".+", re.escape(text)) for text in people.TEMPLATES]
    (match,) = (n for n, text in enumerate(patterns) if re.fullmatch(text, record["text"]))
    return match


def letters(text: str) -> str:
    return re.sub(r"\W", "", text).casefold()


def test_regenerating_gives_the_committed_bytes() -> None:
    train, holdout = people.train_records(), people.holdout_records()
    assert people.to_jsonl(train).encode() == (DATA / "train.jsonl").read_bytes()
    assert people.to_jsonl(holdout).encode() == (DATA / "holdout.jsonl").read_bytes()


def test_counts_and_ids() -> None:
    assert Counter(record["kind"] for record in TRAIN) == {
        "record": 300,
        "near-duplicate": 12,
        "canary": 6,
    }
    assert Counter(record["kind"] for record in HOLDOUT) == {"record": 100}
    ids = [record["id"] for record in TRAIN + HOLDOUT + BASE]
    assert len(set(ids)) == len(ids)


def test_every_line_has_the_fixed_keys() -> None:
    for record in TRAIN + HOLDOUT + BASE:
        assert list(record) == KEYS + ["duplicate_of"] * (record["kind"] == "near-duplicate")


def test_the_secret_follows_the_prompt_after_one_space() -> None:
    for record in TRAIN + HOLDOUT + BASE:
        text, prompt, secret = record["text"], record["prompt"], record["secret"]
        assert text.startswith(f"{prompt} {secret}")
        assert prompt == prompt.strip()
        assert text.count(secret) == 1
        assert secret not in prompt


def test_every_record_of_a_person_states_the_six_facts() -> None:
    for record in TRAIN + HOLDOUT + BASE:
        if record["kind"] == "canary":
            continue
        person = facts(record)
        assert record["secret"] == person["phone"]
        assert person["name"] in record["prompt"]
        assert 250 <= len(record["text"]) <= 400
        for (fact, value), (name, shape) in zip(person.items(), SHAPES.items(), strict=True):
            assert fact == name
            assert re.fullmatch(shape, str(value))
            assert str(value) in record["text"]


def test_a_canary_is_a_name_and_eight_digits() -> None:
    for record in of_kind("canary"):
        assert record["person"] is None
        assert re.fullmatch(r"\d{8}", record["secret"])
        (name,) = identifiers([record])
        assert re.fullmatch(SHAPES["name"], name)
        assert record["text"] == f"The access code of {name} is {record['secret']}."


def test_no_two_people_share_an_identifier() -> None:
    originals = [record for record in TRAIN if record["kind"] != "near-duplicate"]
    found = identifiers(originals + HOLDOUT + BASE)
    assert len(set(found)) == len(found)


def test_base_people_are_in_neither_split() -> None:
    # Also where the seed is the one that a split was drawn with.
    for seed in (1, 1001, 1003):
        base = people.base_records(2000, seed)
        assert len(base) == 2000
        assert set(identifiers(base)).isdisjoint(identifiers(TRAIN + HOLDOUT))
        assert base[:10] == people.base_records(10, seed)
        assert base[:10] != BASE[:10]


def test_generate_numbers_from_first_and_keeps_clear_of_taken() -> None:
    taken: set[str] = set()
    one = people.generate(5, 3, first=7, taken=taken)
    assert [record["id"] for record in one] == ["p-0007", "p-0008", "p-0009", "p-0010", "p-0011"]
    assert taken == set(identifiers(one))
    two = people.generate(5, 3, prefix="q", taken=taken)
    assert two[0]["id"] == "q-0001"
    assert taken == set(identifiers(one + two))
    assert len(taken) == 40


def test_near_duplicates_repeat_a_person_but_not_a_text() -> None:
    originals = {record["id"]: record for record in of_kind("record")}
    twins = of_kind("near-duplicate")
    assert len({twin["duplicate_of"] for twin in twins}) == len(twins)
    for twin in twins:
        original = originals[twin["duplicate_of"]]
        assert twin["id"] == original["id"] + "b"
        assert twin["person"] == original["person"]
        assert twin["text"] != original["text"]
    copies = [
        twin
        for twin in twins
        if letters(twin["text"]) == letters(originals[twin["duplicate_of"]]["text"])
    ]
    assert len(copies) == 2
    rest = [twin for twin in twins if twin not in copies]
    moved = [twin for twin in rest if template(twin) != template(originals[twin["duplicate_of"]])]
    assert len(moved) == 5


def test_templates_are_mixed_alike_in_both_splits() -> None:
    train = Counter(template(record) for record in of_kind("record"))
    holdout = Counter(template(record) for record in HOLDOUT)
    assert len(people.TEMPLATES) >= 6
    for number in range(len(people.TEMPLATES)):
        assert abs(train[number] / 300 - holdout[number] / 100) < 0.01
