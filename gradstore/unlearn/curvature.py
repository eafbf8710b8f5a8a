"""How firmly the records that stay hold a model where it is: the Gauss-Newton matrix of its
embedding, never formed, and the linear systems it appears in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from gradstore.capture.taps import embedding_of
from gradstore.errors import ForgetError

ENTRIES = 2**25  # logits in memory at once, per tensor

Operator = Callable[[Tensor], Tensor]


class GaussNewton:
    """v → G v for the mean loss per token of some samples, at the model as it is now.

    G = mean over predictions of Jᵀ (diag p − p pᵀ) J, with J the Jacobian of the logits with
    respect to the token embedding (V, d), both of its sides where it is tied: the generalized
    Gauss-Newton matrix, which for cross-entropy is the Fisher information (Martens, "New insights
    and perspectives on the natural gradient method", 2020, §8-9). A product costs a forward pass
    with its derivative, another forward pass, and a backward pass over the samples.
    """

    def __init__(self, network: nn.Module, samples: Sequence[Tensor]) -> None:
        weight = embedding_of(network).weight
        [self._name] = [name for name, each in network.named_parameters() if each is weight]
        self._network, self._weight = network, weight.detach()
        padding = getattr(embedding_of(network), "padding_idx", None)
        self._still = [] if padding is None else [padding]  # rows that no gradient moves
        self._samples = samples
        self._predictions = sum(len(tokens) - 1 for tokens in samples)

    @torch.no_grad()
    def __call__(self, v: Float[Tensor, "V d"]) -> Float[Tensor, "V d"]:
        """G v. Raises :class:`ForgetError` for a model without forward derivatives."""
        v, product = v.to(self._weight).clone(), torch.zeros_like(self._weight)
        v[self._still] = 0
        with differentiable(self._network):
            for _, batch in padded_batches(self._network, self._samples):
                product += self._of_batch(batch, v)
        product[self._still] = 0
        return product / max(1, self._predictions)

    def _of_batch(self, batch: dict[str, Tensor], v: Tensor) -> Tensor:
        def logits(weight: Tensor) -> Tensor:
            return logits_at(self._network, {self._name: weight}, batch)

        z, dz = forward_derivative(self._network, logits, self._weight, v)
        p = z.softmax(-1)
        pulled = p * (dz - (p * dz).sum(-1, keepdim=True))
        pulled *= batch["attention_mask"][:, 1:, None]
        product: Tensor = vjp(logits, self._weight)[1](pulled)[0]
        return product


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
    network: nn.Module, function: Operator, at: Tensor, along: Tensor
) -> tuple[Tensor, Tensor]:
    """``function`` and its derivative. Raises :class:`ForgetError` where a model has none."""
    try:
        value, derivative = jvp(function, (at,), (along,))[:2]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # as torch says it, NotImplementedError among them
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


@dataclass(frozen=True)
class Solution:
    """``x``, the iterations it took, and |Ax − b| ÷ |b| in the preconditioner's norm."""

    x: Tensor
    iterations: int
    residual: float


def conjugate_gradients(
    operator: Operator, b: Tensor, diagonal: Tensor | float, *, iterations: int, tolerance: float
) -> Solution:
    """Solve A x = b for a symmetric positive definite A, preconditioned by a diagonal.

    Hestenes and Stiefel 1952, in the form of Nocedal and Wright, algorithm 5.3. Stopping early
    damps what is held most firmly first, so a few iterations are useful already.
    """
    x, r = torch.zeros_like(b), b.clone()
    z = r / diagonal
    p, squared = z.clone(), float((r * z).sum())
    first, taken = squared, 0
    while taken < iterations and squared > tolerance**2 * first:
        image = operator(p)
        step = squared / float((p * image).sum())
        x += step * p
        r -= step * image
        z = r / diagonal
        before, squared = squared, float((r * z).sum())
        p = z + squared / before * p
        taken += 1
    return Solution(x, taken, (squared / first) ** 0.5 if first else 0.0)
