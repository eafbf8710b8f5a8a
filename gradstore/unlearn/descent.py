"""A baseline as a forget request: its steps first, then what they add up to as one update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from gradstore.capture.layers import matrix
from gradstore.capture.taps import embedding_of
from gradstore.errors import ForgetError
from gradstore.store.erasures import Refused
from gradstore.training.corpus import Document, tokenize
from gradstore.training.model import context_of
from gradstore.unlearn.baselines import BaselineSettings, retained_from, unlearn_by_steps
from gradstore.unlearn.request import Subject
from gradstore.unlearn.settings import EMBEDDING, ForgetSettings
from gradstore.unlearn.verdict import ENOUGH
from gradstore.unlearn.walk import Moved


def descend(
    subject: Subject,
    kind: str,
    settings: ForgetSettings,
    kept: Sequence[Document] | None,
    target: float,
    progress: Callable[[str], None],
) -> Moved:
    """Take a baseline's steps until the mean loss crosses ``target`` (nats per token).

    It moves the whole model, or with ``layers`` the embedding alone, and descends on the records
    ``kept`` or those that the run stored, without what is to be forgotten. GradDiff's retained term
    is per sequence, NPO's per token, as their authors' code has them. Leaves the model as it was.
    Raises :class:`ForgetError` where nothing stays, or no step comes nearer to the target, and
    :class:`DataError` for a record of fewer than two tokens.
    """
    tokens = subject.store.tokens(list(subject.samples.values()), subject.run["run_id"])
    forgotten = list(tokens.values())
    stay = _staying(subject, forgotten, kept, settings.seed)
    assert settings.steps is not None
    assert settings.learning_rate is not None
    of_network = BaselineSettings(
        method=cast(Any, kind),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        retained_weight=1.0 if kind == "graddiff" else len(stay) / sum(len(t) - 1 for t in stay),
        embedding_only=settings.layers == EMBEDDING,
        seed=settings.seed,
    )
    weights = dict(subject.network.named_parameters())
    starts = {name: weight.detach().clone() for name, weight in weights.items()}
    taken = unlearn_by_steps(subject.network, forgotten, stay, of_network, target=target)
    updates = {}
    with torch.no_grad():
        for name, weight in weights.items():
            if bool((moved := weight - starts[name]).any()):
                own = "embedding" if weight is embedding_of(subject.network).weight else name
                updates[own] = matrix(moved).cpu()
            weight.copy_(starts[name])
    first, last, chosen = taken.points[0], taken.points[-1], taken.chosen
    too_slow = last.step == settings.steps and not taken.reached
    advice = "raise --steps or --learning-rate" if too_slow else "lower --learning-rate"
    how = f"{kind} at learning rate {settings.learning_rate:g} (steps taken: {last.step})"
    if not updates:
        raise ForgetError(
            f"{how} led from {first.forget:.3f} to {last.forget:.3f} nats per token, no nearer to "
            f"{target:.3f}: {advice}"
        )
    came = (chosen.forget - first.forget) / (target - first.forget)
    reached = taken.reached and came >= ENOUGH  # a long step may jump over the target
    progress(f"{kind}: {chosen.step} steps, loss {chosen.forget:.3f} nats per token")
    return Moved(updates, reached, ended=f"{how} did not meet the target: {advice}")


def _staying(
    subject: Subject, forgotten: Sequence[Tensor], kept: Sequence[Document] | None, seed: int
) -> list[Int[Tensor, " t"]]:
    """Token ids of what stays; of documents without what was erased, or by id or text forgotten."""
    gone = {*subject.samples, *subject.gone}
    if kept is None:
        stay = retained_from(subject.store, subject.run, sorted(gone), seed=seed)
    else:
        if subject.tokenizer is None:
            raise ForgetError(f"{subject.model} has no tokenizer to read --retained with: add one")
        given = tokenize(kept, subject.tokenizer, context_of(subject.network), truncate=True)
        gone |= Refused.of(subject.store).among(given).keys()
        texts = {tuple(tokens.tolist()) for tokens in forgotten}
        stay = [t for i, t in given.items() if i not in gone and tuple(t.tolist()) not in texts]
        if left_out := len(given) - len(stay):
            subject.notes.append(
                f"left out of the {len(given)} records of --retained, as forgotten or erased: "
                f"{left_out}"
            )
    if not stay:
        raise ForgetError("nothing stays that could be kept: give other records with --retained")
    return stay
