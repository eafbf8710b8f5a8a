"""What tokens say, one by one, for a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradstore.errors import ModelError
from gradstore.report.request import Texts
from gradstore.store.store import Store

_BROKEN = "\ufffd"  # what a tokenizer says of half a character
_LONGEST = 16  # tokens that are waited for; a character has at most 4, and they may overlap


def texts_of(store: Store, number: int, model: Path | None) -> Texts:
    """How to read a request's tokens: by ``model``'s tokenizer, else that of its checkpoints.

    Their numbers stand for them where no checkpoint is left. Raises :class:`ModelError` if
    ``model`` has no tokenizer, or another one than the store's.
    """
    rows = store.rows("SELECT model_in, model_out FROM requests WHERE request_id = ?", [number])
    tokenizer = tokenizer_of(store, model, [path for row in rows for path in row])
    if tokenizer is None:
        return lambda ids: [f"#{token}" for token in ids]
    return lambda ids: decode(tokenizer, ids)


def tokenizer_of(store: Store, model: Path | None, checkpoints: Sequence[str | None]) -> Any | None:
    """The tokenizer that a store's records were cut with: ``model``'s, else one of ``checkpoints``.

    None where no checkpoint is left. Raises :class:`ModelError` if ``model`` has none, or another.
    """
    from gradstore.identity import digest_tokenizer  # here: torch is not always needed
    from gradstore.training.model import load_tokenizer

    expected = store.model.tokenizer
    left = [Path(path) for path in checkpoints if path and Path(path).is_dir()]
    for folder in left if model is None else [model]:
        try:
            tokenizer = load_tokenizer(folder)
        except ModelError:
            if model is not None:
                raise
            continue
        if expected in (None, digest_tokenizer(tokenizer)):
            return tokenizer
        if model is not None:
            raise ModelError(
                f"the tokenizer of {model} is not the one that the store's records were cut with; "
                "give the checkpoint that the request started from (`gradstore runs`)"
            )
    return None


def decode(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of every token; a character of several tokens is said by the last of them."""
    found, pending = [], list[int]()
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending, clean_up_tokenization_spaces=False)
        if text.endswith(_BROKEN) and len(pending) < _LONGEST:
            found.append("")
            continue
        piece = tokenizer.convert_ids_to_tokens(pending[0])
        if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" "):
            text = " " + text  # a sentence piece loses its space when decoded alone
        found.append(text)
        pending = []
    return found
