"""Training data is read from any of its formats, and refused with the place and the next step."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow.parquet import write_table

from gradstore.errors import DataError
from gradstore.training.corpus import Document, read_corpus, tokenize

ROWS = [
    {"id": "p-1", "text": 'Ada, a baker, said "so".', "age": 30},
    {"id": "p-2", "text": "Émile is 李's friend.\nHe paints.", "age": 41},
    {"id": "p-3", "text": "Cleo acts; Cleo rests.", "age": 52},
]
DOCUMENTS = [Document(str(row["id"]), str(row["text"])) for row in ROWS]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    return path


def write_csv(path: Path, rows: list[Any], encoding: str = "utf-8") -> Path:
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[Any]) -> Path:
    write_table(pyarrow.Table.from_pylist(rows), path)
    return path


WRITERS = [
    (write_jsonl, "people.jsonl"),
    (write_jsonl, "people.ndjson"),
    (write_csv, "people.csv"),
    (write_parquet, "people.parquet"),
]


class Words:
    """A tokenizer that gives each word its length."""

    def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


@pytest.mark.parametrize(("write", "name"), WRITERS)
class TestFormatsWithFields:
    def test_all_records_in_their_order(self, write: Any, name: str, tmp_path: Path) -> None:
        assert read_corpus(write(tmp_path / name, ROWS)) == DOCUMENTS

    def test_other_field_names(self, write: Any, name: str, tmp_path: Path) -> None:
        rows = [{"uuid": row["id"], "bio": row["text"], "text": "other"} for row in ROWS]
        assert read_corpus(write(tmp_path / name, rows), "uuid", "bio") == DOCUMENTS

    def test_numeric_ids_become_text(self, write: Any, name: str, tmp_path: Path) -> None:
        rows = [{"id": number, "text": "some text"} for number in (0, 7, 12345678901234567)]
        documents = read_corpus(write(tmp_path / name, rows))
        assert [document.id for document in documents] == ["0", "7", "12345678901234567"]

    @pytest.mark.parametrize(
        ("id_field", "text_field", "missing", "option"),
        [("uuid", "text", "uuid", "--id-field"), ("id", "bio", "bio", "--text-field")],
    )
    def test_a_missing_field_is_named_with_those_there_are(
        self, write: Any, name: str, tmp_path: Path, id_field: str, text_field: str,
        missing: str, option: str,
    ) -> None:  # fmt: skip
        path = write(tmp_path / name, ROWS)
        said = rf"no '{missing}' \(fields: id, text, age\); rename .* with ingest's {option}"
        with pytest.raises(DataError, match=said):
            read_corpus(path, id_field, text_field)

    def test_an_empty_text_is_missing(self, write: Any, name: str, tmp_path: Path) -> None:
        path = write(tmp_path / name, [ROWS[0], {"id": "p-2", "text": "", "age": 1}])
        with pytest.raises(DataError, match="no 'text'"):
            read_corpus(path)

    def test_an_id_may_not_occur_twice(self, write: Any, name: str, tmp_path: Path) -> None:
        path = write(tmp_path / name, [*ROWS, dict(ROWS[1], text="another")])
        with pytest.raises(DataError, match=r"line \d: the id 'p-2' occurs twice; ids must be uni"):
            read_corpus(path)


def test_text_has_a_record_a_line_numbered_like_the_lines(tmp_path: Path) -> None:
    path = tmp_path / "people.txt"
    path.write_text("first one\n\n  third one  \nfourth", "utf-8")
    assert read_corpus(path) == [
        Document("1", "first one"),
        Document("3", "third one"),
        Document("4", "fourth"),
    ]


def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path: Path) -> None:
    spreadsheet = write_csv(tmp_path / "people.csv", ROWS, "utf-8-sig")
    assert read_corpus(spreadsheet) == DOCUMENTS


def test_the_same_id_as_number_and_as_text_is_one_id(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "text": "a b"}, {"id": "1", "text": "c"}])
    with pytest.raises(DataError, match="line 2: the id '1' occurs twice"):
        read_corpus(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".txt"])
def test_a_missing_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"absent{suffix}"
    with pytest.raises(DataError, match=f"^there is no file {path}"):
        read_corpus(path)


def test_an_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"people\.xlsx is none of \.jsonl, .*; convert it"):
        read_corpus(tmp_path / "people.xlsx")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_an_empty_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("\n")
    with pytest.raises(DataError, match="holds no records"):
        read_corpus(tmp_path / name)


def test_bad_json_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "people.jsonl"
    path.write_text('{"id": 1, "text": "a b"}\n\n{"id": 2, "text": \n')
    with pytest.raises(DataError, match="line 3: not JSON"):
        read_corpus(path)


def test_a_line_that_is_no_object(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "people.jsonl", [ROWS[0], ["p-2", "text"]])
    with pytest.raises(DataError, match=r"line 2: expected an object with fields, got \['p-2'"):
        read_corpus(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_what_is_not_utf_8(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes('{"id": 1, "text": "Émile"}'.encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_corpus(tmp_path / name)


def test_what_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR2 or so")
    with pytest.raises(DataError, match="cannot be read"):
        read_corpus(tmp_path / "a.parquet")


def test_tokens_by_id() -> None:
    tokens = tokenize([Document("a", "one three"), Document("b", "seven is")], Words(), 2)
    assert {sample: row.tolist() for sample, row in tokens.items()} == {"a": [3, 5], "b": [5, 2]}


def test_a_text_that_is_too_long_is_named_or_cut() -> None:
    long = [Document("short", "a bb"), Document("long", "a bb ccc dddd")]
    with pytest.raises(DataError, match="^sample 'long' has 4 tokens, 3 fit; .* with --truncate$"):
        tokenize(long, Words(), 3)
    cut = tokenize(long, Words(), 3, truncate=True)
    assert [row.tolist() for row in cut.values()] == [[1, 2], [1, 2, 3]]
    assert tokenize(long, Words(), 4)["long"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("text", ["one", " "])
def test_a_text_of_one_token_has_nothing_to_learn(text: str) -> None:
    with pytest.raises(DataError, match="^sample 'a' has fewer than two tokens"):
        tokenize([Document("a", text)], Words(), 8)
