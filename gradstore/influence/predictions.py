"""What samples ask a network to predict, as functions of its weights that can be derived."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from gradstore.capture.taps import embedding_of
from gradstore.errors import ForgetError

ENTRIES = 2**25  # logits in memory at once, per tensor
_NO_DERIVATIVE = ("forward AD", "forward-mode", "jvp", "setup_context")  # what PyTorch says then


class Predictions:
    """The predictions that some samples ask of a network, as functions of its embedding alone.

    The weight (V, d) is the token embedding, both of its sides where it is tied.
    """

    def __init__(self, network: nn.Module, samples: Sequence[Tensor]) -> None:
        weight = embedding_of(network).weight
        [self._name] = [name for name, each in network.named_parameters() if each is weight]
        self.network, self.weight = network, weight.detach()
        padding = getattr(embedding_of(network), "padding_idx", None)
        self._still = [] if padding is None else [padding]  # rows that no gradient moves
        self._samples = samples
        self._count = sum(len(tokens) - 1 for tokens in samples)

    @torch.no_grad()
    def mean(
        self,
        product: Callable[[dict[str, Tensor], Float[Tensor, "V d"]], Float[Tensor, "V d"]],
        v: Float[Tensor, "V d"],
    ) -> Float[Tensor, "V d"]:
        """``product(batch, v)`` summed over batches, per prediction; without dropout."""
        v, total = v.to(self.weight).clone(), torch.zeros_like(self.weight)
        v[self._still] = 0
        with differentiable(self.network):
            for _, batch in padded_batches(self.network, self._samples):
                total += product(batch, v)
        total[self._still] = 0
        return total / max(1, self._count)

    def logits(
        self, batch: dict[str, Tensor], weight: Float[Tensor, "V d"]
    ) -> Float[Tensor, "n t V"]:
        """What a batch's predictions would be with ``weight`` as the embedding."""
        return logits_at(self.network, {self._name: weight}, batch)


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
