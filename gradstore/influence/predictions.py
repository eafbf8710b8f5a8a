"""What samples ask a network to predict, as functions of its weights that can be derived."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from gradstore.capture.layers import parameter
from gradstore.capture.taps import embedding_of
from gradstore.errors import ForgetError

ENTRIES = 2**25  # logits in memory at once, per tensor
_NO_DERIVATIVE = ("forward AD", "forward-mode", "jvp", "setup_context")  # what PyTorch says then


class Predictions:
    """The predictions that some samples ask of a network, as functions of some of its weights.

    ``names`` are the weights that vary, as :meth:`Record.gradients` has them: ``embedding`` (the
    token embedding, both of its sides where it is tied), ``position``, an untied ``head``,
    ``<layer>.weight``, ``<layer>.bias``. They lie one after the other in a vector (n,), as
    :func:`flat` puts them. Raises ``KeyError`` for another name, ``ValueError`` for a weight that
    is named twice.
    """

    def __init__(
        self, network: nn.Module, samples: Sequence[Tensor], names: Iterable[str] = ("embedding",)
    ) -> None:
        of = {id(weight): name for name, weight in network.named_parameters()}
        named = {name: parameter(network, name) for name in names}
        self._weights = {of[id(weight)]: weight.detach() for weight in named.values()}
        if len(self._weights) < len(named):
            raise ValueError(f"some of these are one weight, name it once: {', '.join(named)}")
        self.network = network
        self._samples = samples
        self._count = sum(len(tokens) - 1 for tokens in samples)
        self._moves = self._mask(embedding_of(network))

    @property
    def start(self) -> Float[Tensor, " n"]:
        """The weights as they are now, copied."""
        return flat(self._weights)

    @torch.no_grad()
    def mean(
        self,
        product: Callable[[dict[str, Tensor], Float[Tensor, " n"]], Float[Tensor, " n"]],
        v: Float[Tensor, "*n"],
    ) -> Float[Tensor, "*n"]:
        """``product(batch, v)`` summed over batches, per prediction; without dropout.

        ``v`` may have any shape of n entries, such as that of the one weight that varies; what
        comes back has the same.
        """
        along = v.flatten().to(self.start)
        total = torch.zeros_like(along)
        if self._moves is not None:
            along = along * self._moves
        with differentiable(self.network):
            for _, batch in padded_batches(self.network, self._samples):
                total += product(batch, along)
        if self._moves is not None:
            total *= self._moves
        return (total / max(1, self._count)).view(v.shape)

    def logits(
        self, batch: dict[str, Tensor], weights: Float[Tensor, " n"]
    ) -> Float[Tensor, "b t V"]:
        """What a batch's predictions would be with other ``weights``."""
        return logits_at(self.network, parts(weights, self._weights), batch)

    def _mask(self, embedding: nn.Embedding) -> Float[Tensor, " n"] | None:
        """Nought for the padding's row of the embedding, which no gradient moves, and else one."""
        if (row := getattr(embedding, "padding_idx", None)) is None:
            return None
        mask = torch.ones_like(self.start)
        for name, part in parts(mask, self._weights).items():
            if self.network.get_parameter(name) is embedding.weight:
                part[row] = 0
        return mask


def flat(tensors: Mapping[str, Tensor]) -> Float[Tensor, " n"]:
    """All entries of some tensors, one tensor after the other."""
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def parts(v: Float[Tensor, " n"], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What :func:`flat` put together, in the shapes of ``like``; views of ``v``."""
    pieces = v.split([tensor.numel() for tensor in like.values()])
    return {name: piece.view(like[name].shape) for name, piece in zip(like, pieces, strict=True)}


@contextmanager
def differentiable(network: nn.Module) -> Iterator[None]:
    """Without dropout, and with unfused attention: the others have no forward derivative."""
    was_training = network.training
    network.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        network.train(was_training)


def forward_derivative(
    network: nn.Module, function: Callable[[Tensor], Tensor], at: Tensor, along: Tensor
) -> tuple[Tensor, Tensor]:
    """``function`` and its derivative. Raises :class:`ForgetError` where a model has none.

    Other errors, such as too little memory, are left as they are.
    """
    try:
        value, derivative = jvp(function, (at,), (along,))[:2]
    except RuntimeError as error:  # a missing derivative has no type of its own in PyTorch
        if not any(word in str(error) for word in _NO_DERIVATIVE):
            raise
        raise ForgetError(
            f"{type(network).__name__} has no forward derivative ({error}); "
            "give --direction applied"
        ) from error
    return value, derivative


def logits_at(
    network: nn.Module, weights: dict[str, Tensor], batch: dict[str, Tensor]
) -> Float[Tensor, "b t V"]:
    """Predictions of a batch's next tokens, with some of the model's weights replaced."""
    output = functional_call(network, weights, (), {**batch, "use_cache": False})
    logits: Tensor = output.logits[:, :-1]
    return logits


def padded_batches(
    network: nn.Module, samples: Sequence[Tensor]
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Samples of similar length together, with their places; bounded by ``ENTRIES`` logits."""
    weight = embedding_of(network).weight
    order, at = sorted(range(len(samples)), key=lambda i: len(samples[i])), 0
    while at < len(order):
        longest = len(samples[order[min(at + 15, len(order) - 1)]])
        count = max(1, min(16, ENTRIES // (len(weight) * longest)))
        places = order[at : at + count]
        some = [samples[i].long() for i in places]
        at += count
        masks = [torch.ones_like(tokens) for tokens in some]
        yield (
            places,
            {
                "input_ids": pad_sequence(some, batch_first=True).to(weight.device),
                "attention_mask": pad_sequence(masks, batch_first=True).to(weight.device),
            },
        )
