"""Iterative unlearning: ascend, measure, take the next gradients, ascend again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gradstore.capture.taps import embedding_of
from gradstore.store.files import replace_durably, write_durably
from gradstore.unlearn import controls
from gradstore.unlearn.direction import raw
from gradstore.unlearn.dose import Limits, follow_target
from gradstore.unlearn.request import Subject
from gradstore.unlearn.target import Target
from gradstore.unlearn.walk import Audience, Walk


@dataclass(frozen=True)
class Rounds:
    """The sum of all rounds' steps (V, d), to be added once, and how they ended."""

    update: Float[Tensor, "V d"]
    taken: int
    reached: bool


def iterate(
    subject: Subject,
    audience: Audience,
    kind: str,
    rounds: int,
    target: Target,
    limits: Limits,
    unfinished: Path | None,
    progress: Callable[[str], None],
) -> Rounds:
    """Go to ``target`` in equal parts of the way, a round each.

    In every round the direction is the next stored epoch's gradients (``raw``, from the first again
    after the last) or those of the model as it then is (``fresh``), and the dose meets the round's
    part of the way. Ends early at the limits: that on the held-out loss counts from the start, that
    on single samples from round to round. What is done is kept in ``unfinished``, if given, after
    every round, so that the same request goes on there. Leaves the model as it was.
    """
    store, run, network = subject.store, subject.run, subject.network
    numbers = list(subject.samples.values())
    tokens = [audience.tokens[at] for at in audience.of("forget")]
    asked = [subject.digest, run["name"], *sorted(subject.samples), kind, rounds, target.loss]
    state = _resume(unfinished, sha256(json.dumps(asked).encode()).hexdigest())
    if state.done:
        progress(f"going on after round {state.done} of {rounds}, kept in {unfinished}")
    weight, reached = embedding_of(network).weight, True
    origin = weight.detach().clone()
    while state.done < rounds and reached:
        with torch.no_grad():
            weight.copy_(origin) if state.total is None else weight.copy_(origin + state.total)
        step = (
            raw(store, run, numbers, exposure=state.done).update.to(weight)
            if kind == "raw"
            else controls.fresh(network, tokens).detach()
        )
        walk = Walk(network, {"embedding": step}, audience)
        here = walk.measure(0.0)
        if state.total is None:
            state = replace(state, forget=here.forget, holdout=here.holdout)
        part = state.forget + (target.loss - state.forget) * (state.done + 1) / rounds
        left = limits
        if limits.holdout is not None and here.holdout is not None and state.holdout is not None:
            left = replace(limits, holdout=limits.holdout - (here.holdout - state.holdout))
        first = walk.first_dose(part)
        path = follow_target(walk.measure, part, first, left)
        reached, moved = path.reached, path.chosen.dose * step
        total = moved if state.total is None else state.total + moved
        state = replace(state, done=state.done + 1, total=total)
        progress(f"round {state.done} of {rounds}: loss {path.chosen.forget:.3f} nats per token")
        if unfinished is not None:
            _keep(unfinished, state)
    with torch.no_grad():
        weight.copy_(origin)
    if unfinished is not None:
        unfinished.unlink(missing_ok=True)
    assert state.total is not None
    return Rounds(state.total.cpu(), state.done, reached)


@dataclass(frozen=True)
class _State:
    """What rounds have led to; ``forget`` and ``holdout`` are the mean losses they began at."""

    key: str
    done: int = 0
    forget: float = 0.0
    holdout: float | None = None
    total: Tensor | None = None


def _keep(file: Path, state: _State) -> None:
    assert state.total is not None
    facts = {"done": state.done, "forget": state.forget, "holdout": state.holdout}
    content = save({"total": state.total}, {"key": state.key, "facts": json.dumps(facts)})
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp")
    write_durably(temporary, [content])
    replace_durably(temporary, file)


def _resume(file: Path | None, key: str) -> _State:
    """What an earlier attempt at the same request kept; a new state if there is none."""
    if file is None:
        return _State(key)
    try:
        with safe_open(file, "pt") as kept:
            meta, total = kept.metadata(), kept.get_tensor("total")
        if meta["key"] == key:
            return _State(key, **json.loads(meta["facts"]), total=total)
    except (FileNotFoundError, SafetensorError, LookupError, ValueError, TypeError):
        pass  # another request's, or none: begun anew
    return _State(key)
