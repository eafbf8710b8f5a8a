"""A collator that lets the samples' ids travel with the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gradstore.capture.taps import ID_ARGUMENT, encode_ids
from gradstore.errors import CaptureError

_FOR_THE_MODEL = ("input_ids", "attention_mask", "labels", "position_ids", "token_type_ids")


class IdCollator:
    """Wrap a collator: ids, which stock collators crash on or drop, arrive as ``sample_ids``.

    Other columns that a causal language model does not take are left out, as the ``Trainer`` does
    by itself when ``remove_unused_columns=True`` (which would remove the ids: set it to False).
    """

    def __init__(
        self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], id_field: str = "id"
    ) -> None:
        self._collator, self._id_field = collator, id_field

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate ``features``, adding their ids as a (B, L) uint8 tensor."""
        missing = [f for f in features if self._id_field not in f]
        if missing:
            raise CaptureError(
                f"a sample has no column {self._id_field!r} (it has {', '.join(missing[0])}); set "
                "TrainingArguments(remove_unused_columns=False) and name the column that holds ids"
            )
        kept = [{k: f[k] for k in _FOR_THE_MODEL if k in f} for f in features]
        batch = dict(self._collator(kept))
        batch[ID_ARGUMENT] = encode_ids([f[self._id_field] for f in features])
        return batch
