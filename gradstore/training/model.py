"""The model and tokenizer to train: an existing checkpoint, or a fresh one from a config."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from gradstore.errors import ModelError

END = "<|endoftext|>"
# what its HTTP library raises without a network: that library differs between the hub's versions
_UNREACHABLE: tuple[Any, ...] = (OSError, *HfHubHTTPError.__bases__)
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load_model(name: str | Path) -> Any:
    """A causal language model from a local directory or a hub name, in float32."""
    options = _options(str(name), "is not a model that can be loaded", _MODEL)
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(name), dtype=torch.float32, use_safetensors=True, **options
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name} is not a model that can be loaded: {_found(name, error)} {_MODEL}"
        ) from error


def load_tokenizer(name: str | Path) -> Any:
    """A tokenizer from a local directory or a hub name."""
    options = _options(str(name), "holds no tokenizer", _TOKENIZER)
    try:
        return AutoTokenizer.from_pretrained(str(name), **options)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name} holds no tokenizer: {_found(name, error)} {_TOKENIZER}"
        ) from error


_MODEL = "Give a directory that save_pretrained wrote (safetensors), or a hub name."
_TOKENIZER = "Give a directory that a tokenizer's save_pretrained wrote, or a hub name."


def _options(name: str, fault: str, advice: str) -> dict[str, bool]:
    """What ``from_pretrained`` is to be told of a name, after one look at the hub if it may be one.

    Without that look a mistyped path is asked of the hub for half a minute where there is no
    network; what the hub gave earlier is found there too. Raises :class:`ModelError` for what looks
    like a path and is none: a name of other parts than ``owner/model``, or one that begins with a
    folder that is here.
    """
    if Path(name).is_dir():
        return {}
    owner = name.rpartition("/")[0]
    if Path(name).exists() or not _HUB_NAME.fullmatch(name) or (owner and Path(owner).is_dir()):
        raise ModelError(f"{name} {fault}: there is no such directory. {advice}")
    try:
        huggingface_hub.model_info(name, timeout=10)
    except HfHubHTTPError:
        pass  # the hub answers: what is wrong, loading tells
    except _UNREACHABLE:
        return {"local_files_only": True}
    return {}


def _found(name: str | Path, error: Exception) -> str:
    said = _first_sentence(error)
    return said if Path(name).is_dir() else f"there is no such directory, and of the hub: {said}"


def tokenizer_of(model: str | Path) -> Any:
    """A checkpoint's tokenizer, None if it has none."""
    try:
        return load_tokenizer(model)
    except ModelError:  # a checkpoint without one: its vocabulary cannot be compared
        return None


def new_model(config: str | Path, tokenizer: Any, seed: int) -> Any:
    """A freshly initialised model of a Hugging Face config (JSON with ``model_type``).

    The vocabulary's size and the special tokens are the tokenizer's.
    """
    try:
        settings = json.loads(Path(config).read_text())
        kind = settings.pop("model_type")
    except OSError as error:
        raise ModelError(f"{config} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{config} is not a model config (JSON with a model_type)") from error
    settings |= {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(seed)
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ModelError(f"{config} describes no model: {_first_sentence(error)}") from error


def start_again(start: Mapping[str, Any]) -> Any:
    """The model that a run started from, as its settings remember it.

    ``start`` has a ``model`` (a directory or a hub name), or the ``config`` (``to_diff_dict()``)
    and ``seed`` of a fresh one. Raises :class:`ModelError`.
    """
    if "model" in start:
        return load_model(start["model"])
    torch.manual_seed(start["seed"])
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**start["config"]))


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most ``vocabulary`` tokens, learned from ``texts``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def context_of(model: Any) -> int:
    """How many tokens the model can read at once."""
    return int(getattr(model.config, "max_position_embeddings", None) or 1024)


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0].rstrip(".") + "."
