"""Training data as people have it: JSON lines, CSV, Parquet or text, with an id for each record."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradstore.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet", ".txt")


@dataclass(frozen=True)
class Document:
    """One record: the user's id and its text."""

    id: str
    text: str


def read_corpus(path: Path, id_field: str = "id", text_field: str = "text") -> list[Document]:
    """Read all records of a file.

    A ``.txt`` file has one record a line, whose id is the line's number; the other formats need
    ``id_field`` and ``text_field``. Raises :class:`DataError` naming the line for a file that
    cannot be read, a missing id or text, and ids that occur twice.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} is none of {', '.join(SUFFIXES)}; convert it to one of them")
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    documents: dict[str, Document] = {}
    for where, row in _rows(path):
        if path.suffix == ".txt":
            row = {id_field: where, text_field: row}
        if not isinstance(row, Mapping):
            raise DataError(f"{path}, line {where}: expected an object with fields, got {row!r}")
        for field, option in ((id_field, "--id-field"), (text_field, "--text-field")):
            if row.get(field) in (None, ""):
                raise DataError(
                    f"{path}, line {where}: no {field!r} (fields: {', '.join(map(str, row))}); "
                    f"rename the right one, or name it with ingest's {option}"
                )
        document = Document(str(row[id_field]), str(row[text_field]))
        if not _encodes(document.id + document.text):  # JSON can write half of a character
            raise DataError(
                f"{path}, line {where}: id or text holds half of a surrogate pair, which is no "
                "text; replace it"
            )
        if document.id in documents:
            raise DataError(
                f"{path}, line {where}: the id {document.id!r} occurs twice; ids must be unique, "
                "so that forgetting one means one record"
            )
        documents[document.id] = document
    if not documents:
        raise DataError(f"{path} holds no records")
    return list(documents.values())


def tokenize(
    documents: Iterable[Document], tokenizer: Any, max_length: int, truncate: bool = False
) -> dict[str, Tensor]:
    """Token ids (t,) int64 of each document, by id.

    Raises :class:`DataError` for a document of more than ``max_length`` tokens, unless it may be
    cut, and for one of fewer than two, from which nothing can be predicted.
    """
    tokens = {}
    for document in documents:
        ids = tokenizer(document.text, verbose=False)["input_ids"]
        if len(ids) > max_length and not truncate:
            raise DataError(
                f"sample {document.id!r} has {len(ids)} tokens, {max_length} fit; split it, raise "
                "--max-length up to the model's context, or cut such texts with --truncate"
            )
        if len(ids) < 2:
            raise DataError(f"sample {document.id!r} has fewer than two tokens: nothing to learn")
        tokens[document.id] = torch.tensor(ids[:max_length])
    return tokens


def _encodes(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def lines_of(path: Path) -> list[str]:
    """Lines of a text file; a text's own U+2028 or U+0085 ends none. Raises :class:`DataError`."""
    try:
        with path.open(encoding="utf-8") as file:
            return list(file)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Every record of a file with where it stands (a line's number, from 1)."""
    try:
        if path.suffix == ".parquet":
            from pyarrow.parquet import read_table

            for number, row in enumerate(read_table(path).to_pylist(), 1):
                yield str(number), row
            return
        newline = "" if path.suffix == ".csv" else None
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file)
                for row in reader:
                    yield str(reader.line_num), row
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield str(number), line.strip() if path.suffix == ".txt" else json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason})") from error
    except (OSError, csv.Error, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
