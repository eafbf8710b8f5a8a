"""What is asked about: the gradient of a stored sample, of a text, or of what a model says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradstore.capture.taps import ID_ARGUMENT, Pass, Taps, embedding_of, head_of
from gradstore.errors import InfluenceError, ModelError
from gradstore.evaluate.continuation import greedy
from gradstore.factored import FactoredGradient, Term
from gradstore.identity import digest_checkpoint, identify
from gradstore.influence.activation import activations
from gradstore.influence.layers import gradients_of
from gradstore.store.record import LinearLayer, Sides
from gradstore.store.store import Store
from gradstore.training.model import context_of, load_model, load_tokenizer

Replaced = Literal["hvp", "newton", "activation"]


@dataclass(frozen=True)
class Bent:
    """How a query was bent by a curvature: λ is the ``damping`` added to it.

    It was taken over so many ``records``, drawn by ``seed``. ``residual`` is what the solver's
    ``iterations`` left, relative to the query.
    """

    curvature: str
    solver: str
    damping: float
    residual: float
    iterations: int
    records: int
    seed: int


@dataclass(frozen=True)
class Query:
    """The gradient of a loss in question, summed over its scored tokens, in nats.

    ``gradients`` has it by the epoch it was stored in, or at a checkpoint under the key None, which
    stands for every epoch. ``name`` tells queries apart without repeating a text: what is asked
    about may have to be erased one day. ``sample`` is the id of a stored one.

    ``replaced`` says that records are to meet something else than the gradient: what
    :mod:`gradstore.influence.solved` makes of it for ``hvp`` and ``newton``, ``bent`` as it says,
    or :meth:`Checkpoint.of_activations`. ``beside`` has the gradients of other weights, those of
    linear ``layers`` by their names, where they take part (``hvp``).
    """

    name: str
    gradients: Mapping[int | None, FactoredGradient]
    model_digest: str | None = None
    replaced: Replaced | None = None
    bent: Bent | None = None
    sample: str | None = None
    layers: tuple[LinearLayer, ...] = ()
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    def at(self, epoch: int) -> FactoredGradient | None:
        """The gradient that exposures of an epoch are multiplied with."""
        return self.gradients.get(None, self.gradients.get(epoch))


def of_sample(store: Store, run: Mapping[str, Any], id: str, sides: Sides | None = None) -> Query:
    """The stored gradients of a sample, by epoch. Raises :class:`InfluenceError` if it has none."""
    [(full, number)] = store.resolve([id]).items()
    found: dict[int | None, FactoredGradient] = {
        record.exposure.epoch: record.gradient(store.model, sides=sides)
        for record in store.records([number], run["run_id"])
    }
    if not found:
        raise InfluenceError(
            f"{full!r} has no gradient in {run['name']}: it was held out or never met; name a "
            "checkpoint to take it at with --model"
        )
    return Query(f"id:{full}", found, sample=full)


class Checkpoint:
    """A model to take queries' gradients at, one forward and backward pass each.

    They are taken on ``device``. Raises :class:`ModelError` where it cannot be loaded or is another
    model than the store's.
    """

    def __init__(self, store: Store, folder: Path, device: str = "cpu") -> None:
        self.network = load_model(folder).to(device)
        self._model, self._folder = store.model, folder
        self._model.check(identify(self.network), str(folder))
        self._digest = digest_checkpoint(folder)

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's, which only texts need. Raises :class:`ModelError` as above."""
        tokenizer = load_tokenizer(self._folder)
        self._model.check(identify(self.network, tokenizer), str(self._folder))
        return tokenizer

    def of_tokens(
        self,
        tokens: Int[Tensor, " t"],
        first: int = 1,
        sides: Sides | None = None,
        kind: str = "",
        layers: Sequence[LinearLayer] = (),
    ) -> Query:
        """Of the loss on tokens from number ``first`` on, given all before them.

        With the gradients of ``layers`` beside the embedding's.
        """
        name = self._name(tokens, first, kind)
        gradient = gradient_of(self.network, tokens, first, sides)
        beside = gradients_of(self.network, tokens, first, layers) if layers else {}
        return Query(name, {None: gradient}, self._digest, layers=tuple(layers), beside=beside)

    def of_activations(self, tokens: Int[Tensor, " t"], kind: str = "") -> Query:
        """Of tokens as a whole, their activations in the gradient's place (:func:`activations`)."""
        name = self._name(tokens, 1, kind)
        found = activations(self.network, [tokens])
        return Query(name, {None: found}, self._digest, "activation")

    def of_completion(
        self,
        prompt: str,
        completion: str,
        sides: Sides | None = None,
        layers: Sequence[LinearLayer] = (),
    ) -> Query:
        """Of the loss on a completion alone, given its prompt."""
        start = self.tokens(prompt)
        end = self.tokens(completion, add_special_tokens=False)
        first, whole = max(len(start), 1), torch.cat([start, end])
        return self.of_tokens(whole, first, sides, "completion", layers)

    def of_output(
        self,
        prompt: str,
        count: int,
        sides: Sides | None = None,
        layers: Sequence[LinearLayer] = (),
    ) -> tuple[Query, str]:
        """Of what greedy decoding says after a prompt, at most ``count`` tokens; and its text."""
        start = self.tokens(prompt)
        if not len(start):
            raise InfluenceError("an empty prompt has no first token to go on from; give some text")
        [more] = greedy(self.network, [start], [count], self.tokenizer.eos_token_id)
        query = self.of_tokens(torch.cat([start, more]), len(start), sides, "output", layers)
        return query, str(self.tokenizer.decode(more))

    def tokens(self, text: str, **options: Any) -> Int[Tensor, " t"]:
        """A text's token ids; options are the tokenizer's."""
        ids = self.tokenizer(text, verbose=False, **options)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    def _name(self, tokens: Int[Tensor, " t"], first: int, kind: str) -> str:
        """A query's name; raises :class:`InfluenceError` for tokens that cannot be one."""
        if len(tokens) > context_of(self.network):
            raise InfluenceError(
                f"the query has {len(tokens)} tokens, the model reads {context_of(self.network)}; "
                "shorten it"
            )
        _check_predicted(tokens, first)
        digest = sha256(f"{first} {tokens.tolist()}".encode()).hexdigest()[:16]
        return f"{kind or 'tokens'}:{digest}"


def gradient_of(
    network: nn.Module, tokens: Int[Tensor, " t"], first: int = 1, sides: Sides | None = None
) -> FactoredGradient:
    """∂/∂embedding of the summed cross-entropy of ``tokens[first:]``, exact and factored.

    Both sides of a tied embedding unless ``sides`` is ``input``; without dropout. The rank is the
    number of tokens, and of scored tokens once more for the output side. Raises
    :class:`InfluenceError` where nothing is scored, :class:`ModelError` for a frozen embedding.
    """
    weight = embedding_of(network).weight
    if not weight.requires_grad:
        raise ModelError(
            "the embedding is frozen, so it has no gradient: call "
            "`model.get_input_embeddings().weight.requires_grad_()` first"
        )
    _check_predicted(tokens, first)
    terms: list[Term] = []

    def on_head(one: Pass, gradient: Float[Tensor, "1 t V"]) -> None:
        if head_of(network).weight is weight and sides != "input" and one.hidden is not None:
            terms.append(Term(None, gradient[0, first - 1 : -1], one.hidden[0, first - 1 : -1]))

    def on_embedding(_: Pass, gradient: Float[Tensor, "1 t d"]) -> None:
        terms.append(Term.one_hot(tokens[:-1].to(gradient.device), gradient[0, :-1]))

    taps, was_training = Taps(network, on_head, on_embedding), network.training
    network.eval()
    try:
        batch = tokens.long()[None].to(weight.device)
        logits = network(input_ids=batch, **{ID_ARGUMENT: ["query"]}).logits[0, first - 1 : -1]
        loss = cross_entropy(logits.float(), batch[0, first:], reduction="sum")
        torch.autograd.grad(loss, weight)
    finally:
        network.train(was_training)
        taps.remove()
    cpu = (
        Term(t.index if t.index is None else t.index.cpu(), t.value.cpu(), t.B.cpu()) for t in terms
    )
    return FactoredGradient(cpu, (weight.shape[0], weight.shape[1]))


def _check_predicted(tokens: Int[Tensor, " t"], first: int) -> None:
    if not 1 <= first < len(tokens):
        raise InfluenceError(
            f"of {len(tokens)} tokens none from number {first} on is predicted from others; give a "
            "longer text"
        )
