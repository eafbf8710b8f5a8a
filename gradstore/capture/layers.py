"""The linear layers of a model, by their names: which to capture, and how their weights lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from gradstore.capture.taps import embedding_of, head_of, position_of
from gradstore.errors import CaptureError
from gradstore.store.record import LinearLayer

BLOCKS = "blocks"  # every linear layer but the output head
OF_TOKENS = ("embedding", "head")  # weights with a row for each token
_SHOWN = 4  # names in an error


def split(patterns: str | Sequence[str]) -> list[str]:
    """Patterns as given one by one, separated by commas, or both."""
    given = [patterns] if isinstance(patterns, str) else patterns
    return [part.strip() for text in given for part in text.split(",") if part.strip()]


def linear_layers(model: nn.Module, patterns: str | Sequence[str]) -> dict[str, nn.Module]:
    """The trained ``nn.Linear`` and ``Conv1D`` modules that patterns name, in the model's order.

    Patterns are shell-style (``transformer.h.3.*``, ``*.mlp.c_fc``), or ``blocks`` for all. The
    output head is none of them: ``sides="both"`` stores it in a compact form. Raises
    :class:`CaptureError` for a pattern that matches nothing, and for layers that share a weight.
    """
    wanted = split(patterns)
    if not wanted:
        return {}
    from transformers.pytorch_utils import Conv1D  # no plain loop waits for this import

    head = head_of(model)
    known: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and module.weight.requires_grad
    }
    found = matching(list(known), wanted)
    for pattern in wanted:
        if not matching(list(known), [pattern]):
            raise CaptureError(
                f"no trained linear layer is named {pattern!r}; there are {some_of(list(known))}, "
                f"and {BLOCKS!r} stands for all (the output head is stored with sides='both')"
            )
    weights = {id(known[name].weight) for name in found}
    if len(weights) < len(found):
        raise CaptureError("some of these layers share one weight; name only one of them")
    return {name: known[name] for name in found}


def describe(layers: Mapping[str, nn.Module]) -> list[LinearLayer]:
    """What a store keeps of them; only a ``Conv1D`` has its weight as (in, out)."""
    found = []
    for name, module in layers.items():
        input_first = not isinstance(module, nn.Linear)
        rows, columns = module.weight.shape  # type: ignore[misc]
        width_in, width_out = (rows, columns) if input_first else (columns, rows)
        found.append(LinearLayer(name, width_in, width_out, input_first, module.bias is not None))
    return found


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Those of ``names`` that one of ``patterns`` matches, in their order."""
    every = BLOCKS in patterns
    return [name for name in names if every or any(fnmatchcase(name, p) for p in patterns)]


def some_of(names: Sequence[str]) -> str:
    """A few names, for an error."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "") or "none"


def parameter(model: nn.Module, name: str) -> Tensor:
    """A captured weight by the name that a store has for it.

    ``embedding``, ``position`` and ``head``, or the parameter's own name. Raises ``KeyError``.
    """
    if name == "embedding":
        return embedding_of(model).weight
    if name == "position" and (position := position_of(model)) is not None:
        return position[0].weight
    if name == "head":
        return head_of(model).weight  # type: ignore[return-value]
    return dict(model.named_parameters())[name]


def matrix(weight: Tensor) -> Tensor:
    """A weight as updates have it: rows as long as its last dimension, a bias in one row."""
    return weight.reshape(-1, weight.shape[-1] if weight.ndim else 1)
