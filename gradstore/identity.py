"""Which model this is: what gradients must agree on to fit its weights; digests of files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradstore.errors import ModelError
from gradstore.store.files import sha256_of
from gradstore.store.format import ModelIdentity

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def identify(model: nn.Module, tokenizer: Any = None) -> ModelIdentity:
    """The identity of a Hugging Face causal language model (and of its tokenizer, if given)."""
    from gradstore.capture.taps import embedding_of, head_of, position_of

    embedding, head, position = embedding_of(model), head_of(model), position_of(model)
    weight = head.weight
    return ModelIdentity(
        architecture=type(model).__name__,
        vocabulary=embedding.num_embeddings,
        width=embedding.embedding_dim,
        head_width=int(weight.shape[1]),  # type: ignore[index]
        positions=None if position is None else position[0].num_embeddings,
        tied=weight is embedding.weight,
        tokenizer=None if tokenizer is None else digest_tokenizer(tokenizer),
    )


def digest_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary: the ids mean the same tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return sha256(json.dumps(vocabulary).encode()).hexdigest()


def digest_weights(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of a model's weights, wherever they came from."""
    digest = sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def digest_checkpoint(folder: Path) -> str:
    """SHA-256 over the names and digests of a checkpoint's weight files."""
    files = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    if not files:
        raise ModelError(
            f"{folder} holds no model weights ({' or '.join(_WEIGHTS)}); give the folder that "
            "save_pretrained or `gradstore ingest --out` wrote"
        )
    return _digest_files(files)


def digest_folder(folder: Path) -> str:
    """SHA-256 over the names and digests of every file directly in a folder."""
    return _digest_files(sorted(path for path in folder.iterdir() if path.is_file()))


def _digest_files(files: Sequence[Path]) -> str:
    listing = "\n".join(f"{path.name} {sha256_of(path)}" for path in files)
    return sha256(listing.encode()).hexdigest()
