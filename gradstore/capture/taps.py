"""Hooks that see a training step's tensors without taking part in it.

A pass begins in a forward pre-hook, which takes the sample ids out of the model's arguments, and
ends when the gradient at the embedding's output arrives, the last of the backward pass. Hooks are
plain tensor hooks: full backward hooks do not agree with ``weight.grad`` under checkpointing or
compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradstore.errors import CaptureError

if TYPE_CHECKING:
    from gradstore.capture.measure import HeadFacts

ID_ARGUMENT = "sample_ids"


@dataclass
class Pass:
    """One forward and backward pass of a micro-batch of B samples, S positions."""

    ids: list[str]
    mask: Tensor | None  # (B, S) attention mask
    labels: Tensor | None  # (B, S) as given to the model
    positions: Tensor | None  # (B, S) as given to the model
    tokens: Tensor | None = None  # (B, S)
    hidden: Tensor | None = None  # (B, S, d) entering the head
    logits: Tensor | None = None  # (B, S, V) as the loss sees them
    same_logits: bool = True  # whether the head's output is the logits themselves
    logits_gradient: Tensor | None = None
    wanted: bool = True  # whether any of its samples is to be kept
    facts: HeadFacts | None = None  # what was measured when the head's gradient came
    layers: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # inputs, gradients


class Taps:
    """Install hooks on a causal language model; ``on_head`` and ``on_embedding`` get the tensors.

    ``on_head(pass, gradient)`` is called with the gradient (B, S, V) at the head's output,
    ``on_embedding(pass, gradient)`` with that (B, S, d) at the embedding's, for passes that carry
    ``sample_ids`` while gradients are enabled. By then ``pass.layers`` holds, for each of
    ``layers`` by its name, inputs (B, S, in) and the gradient (B, S, out) at the outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        on_head: Callable[[Pass, Tensor], None],
        on_embedding: Callable[[Pass, Tensor], None],
        layers: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self._on_head, self._on_embedding = on_head, on_embedding
        self._layers = layers or {}
        self._current: Pass | None = None
        self._returning: Pass | None = None  # the one whose backward pass began last
        embedding, head = embedding_of(model), head_of(model)
        self._multiplier = getattr(embedding, "embed_scale", None)
        self._padding = embedding.padding_idx
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            embedding.register_forward_hook(self._embedded),
            head.register_forward_hook(self._headed),
            model.register_forward_hook(self._finished),
            *(
                layer.register_forward_hook(partial(self._ran, name))
                for name, layer in self._layers.items()
            ),
        ]

    def remove(self) -> None:
        """Take all hooks away."""
        while self._handles:
            self._handles.pop().remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = kwargs.pop(ID_ARGUMENT, None)
        self._current = self._returning = None
        if ids is not None and torch.is_grad_enabled():
            self._current = Pass(
                decode_ids(ids),
                kwargs.get("attention_mask"),
                kwargs.get("labels"),
                kwargs.get("position_ids"),
            )
        return args, kwargs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _embedded(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if (one := self._current) is None or one.tokens is not None:
            return
        if not output.requires_grad:
            raise CaptureError(
                "the embedding's output needs no gradient (frozen, or trained through adapters): "
                "nothing can be captured; unfreeze `model.get_input_embeddings().weight`"
            )
        one.tokens = inputs[0].detach()
        if len(one.ids) != len(one.tokens):
            raise CaptureError(
                f"{len(one.ids)} sample ids came with a batch of {len(one.tokens)}; "
                f"give one id a row in `{ID_ARGUMENT}`"
            )
        output.register_hook(lambda gradient: self._arrived(one, gradient))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _headed(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if (one := self._current) is not None and output.requires_grad:
            one.hidden, one.logits = inputs[0].detach(), output.detach()
            output.register_hook(lambda gradient: self._returned(one, gradient.detach()))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _finished(self, _: nn.Module, __: Any, outputs: Any) -> None:
        if (one := self._current) is None:
            return
        self._current = None
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
        if isinstance(logits, Tensor) and (one.tokens is None or one.logits is None):
            raise CaptureError(
                "the model ran without calling the hooks of its layers: it was compiled before "
                "capturing began; start capturing first, then compile"
            )
        if not isinstance(logits, Tensor) or one.logits is None:
            raise CaptureError(
                "the model returned no logits (a fused loss?), so gradstore cannot measure how "
                "each sample entered the loss; turn the fused loss off"
            )
        if logits.data_ptr() != one.logits.data_ptr():  # scaled or capped after the head
            one.same_logits, one.logits = False, logits.detach()
            logits.register_hook(lambda gradient: setattr(one, "logits_gradient", gradient))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _ran(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Await the gradient at a layer's output.

        Checkpointed layers run a second time, within the backward pass. Whichever output takes part
        in it gets the gradient; the other hook is never called.
        """
        one = self._current or self._returning  # passes that share a backward end one by one in it
        if one is not None and output.requires_grad:
            given = inputs[0].detach()
            output.register_hook(lambda g: self._layer_returned(one, name, given, g.detach()))

    def _returned(self, one: Pass, gradient: Tensor) -> None:
        self._returning = one
        self._on_head(one, gradient)

    def _layer_returned(self, one: Pass, name: str, given: Tensor, g: Tensor) -> None:
        if not one.wanted:
            return
        assert one.tokens is not None
        if name in one.layers or g.shape[:-1].numel() != one.tokens.numel():
            raise CaptureError(
                f"layer {name!r} does not run once at every position (shared between blocks, or an "
                "expert?), which capturing needs; leave it out of `layers`"
            )
        shape = (*one.tokens.shape, -1)  # some models flatten positions
        one.layers[name] = given.reshape(shape), g.reshape(shape)

    def _arrived(self, one: Pass, gradient: Tensor) -> None:
        self._returning = None
        missing = self._layers.keys() - one.layers.keys()
        if missing and one.wanted:
            raise CaptureError(
                f"no gradient came to layer {min(missing)!r}, which this pass did not use; leave "
                "it out of `layers`"
            )
        gradient = gradient.detach()
        if self._multiplier is not None:  # the hook sees the scaled output, the weight does not
            gradient = gradient * self._multiplier
        if self._padding is not None and one.tokens is not None:
            gradient = gradient.masked_fill((one.tokens == self._padding)[..., None], 0.0)
        self._on_embedding(one, gradient)


def embedding_of(model: nn.Module) -> nn.Embedding:
    """The token embedding. Raises :class:`CaptureError` if the model has none."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding):
        raise CaptureError(
            f"{type(model).__name__} has no nn.Embedding in get_input_embeddings(); gradstore "
            "captures Hugging Face causal language models"
        )
    return embedding


def head_of(model: nn.Module) -> nn.Module:
    """The output head. Raises :class:`CaptureError` if the model has none."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        raise CaptureError(
            f"{type(model).__name__} has no language-modelling head; load it with "
            "AutoModelForCausalLM"
        )
    return head


def position_of(model: nn.Module) -> tuple[nn.Embedding, int] | None:
    """A learned position embedding and the row that a sample's first token meets, if there is one.

    GPT-2's family counts from the start of the padded row (row 0), OPT's from the first real token
    (row 2): the second number is −1 where padding counts. Models that scale the token embedding's
    output (BART's family) are left out: what flows into their positions is not what flows into it.
    """
    if hasattr(embedding_of(model), "embed_scale"):
        return None
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith((".wpe", ".embed_positions")):
            return module, int(getattr(module, "offset", -1))
    return None


def encode_ids(ids: Sequence[Any]) -> Tensor:
    """Ids of any kind as a (B, L) uint8 tensor of zero-padded UTF-8, as a batch can carry them."""
    raw = [str(i).encode() for i in ids]
    width = max(len(text) for text in raw)
    padded = b"".join(text.ljust(width, b"\0") for text in raw)
    return torch.frombuffer(bytearray(padded), dtype=torch.uint8).view(len(raw), width)


def decode_ids(ids: Any) -> list[str]:
    """The ids of a batch: a list, a tensor of numbers, or what :func:`encode_ids` made."""
    if isinstance(ids, Tensor) and ids.dtype is torch.uint8 and ids.ndim == 2:
        return [bytes(row).rstrip(b"\0").decode() for row in ids.cpu().numpy()]
    return [str(i) for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]
