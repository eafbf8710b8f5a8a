"""Iterative unlearning: ascend, measure, take the next gradients, ascend again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gradstore.capture.taps import embedding_of
from gradstore.evaluate.audience import Audience
from gradstore.store.files import UNFINISHED, make_folder, replace_durably, write_durably
from gradstore.store.store import Store
from gradstore.unlearn import controls
from gradstore.unlearn.direction import raw
from gradstore.unlearn.dose import Limits, follow_target
from gradstore.unlearn.request import Subject
from gradstore.unlearn.target import Target
from gradstore.unlearn.walk import Moved, Walk


def iterate(
    subject: Subject,
    audience: Audience,
    kind: str,
    rounds: int,
    target: Target,
    limits: Limits,
    progress: Callable[[str], None],
    *,
    keep: bool,
) -> Moved:
    """Go to ``target`` in equal parts of the way, a round each.

    In every round the direction is the next stored epoch's gradients (``raw``, from the first again
    after the last) or those of the model as it then is (``fresh``), and the dose meets the round's
    part of the way. Ends early at the limits: that on the held-out loss counts from the start,
    those on samples that stay from round to round. With ``keep`` what is done lies in the store
    after every round, so that the same request goes on there; not in one that is encrypted. Leaves
    the model as it was.
    """
    store, run, network = subject.store, subject.run, subject.network
    numbers = list(subject.samples.values())
    epochs = _stored_epochs(store, run, numbers)
    tokens = [audience.tokens[at] for at in audience.of("forget")]
    asked = [subject.digest, run["name"], kind, rounds, target.loss, asdict(limits)]
    asked += [sorted(subject.samples), sorted(audience.numbers)]
    key = sha256(json.dumps(asked).encode()).hexdigest()[:32]
    unfinished = None
    if keep and store.format.encryption is None:
        unfinished = store.root / UNFINISHED / f"rounds-{key}.safetensors"
    state = _resume(unfinished)
    if state.done:
        progress(f"going on after round {state.done} of {rounds}, kept in {unfinished}")
    weight = embedding_of(network).weight
    origin = weight.detach().clone()
    while state.done < rounds and state.reached:
        with torch.no_grad():
            weight.copy_(origin) if state.total is None else weight.copy_(origin + state.total)
        step = (
            raw(store, run, numbers, epochs=epochs[state.done % len(epochs)]).update.to(weight)
            if kind == "raw"
            else controls.fresh(network, tokens)
        )
        walk = Walk(network, {"embedding": step}, audience)
        here = walk.measure(0.0)
        if state.total is None:
            state = replace(state, forget=here.forget, holdout=here.holdout)
        part = state.forget + (target.loss - state.forget) * (state.done + 1) / rounds
        left = limits
        if limits.holdout is not None and here.holdout is not None and state.holdout is not None:
            left = replace(limits, holdout=max(0.0, limits.holdout + state.holdout - here.holdout))
        first = walk.first_dose(part)
        path = follow_target(walk.measure, part, first, left)
        moved = path.chosen.dose * step
        total = moved if state.total is None else state.total + moved
        state = replace(state, done=state.done + 1, reached=path.reached, total=total)
        progress(f"round {state.done} of {rounds}: loss {path.chosen.forget:.3f} nats per token")
        if unfinished is not None:
            _keep(unfinished, state)
    with torch.no_grad():
        weight.copy_(origin)
    assert state.total is not None
    return Moved({"embedding": state.total.cpu()}, state.reached, unfinished=unfinished)


def _stored_epochs(store: Store, run: dict[str, Any], sample_ids: list[int]) -> list[str]:
    """Those of which every sample has a gradient, or each sample's first if there is none."""
    rows = store.rows(
        """SELECT epoch FROM exposures WHERE run_id = ? AND list_contains(?, sample_id)
           GROUP BY epoch HAVING count(DISTINCT sample_id) = ? ORDER BY epoch""",
        [run["run_id"], sample_ids, len(sample_ids)],
    )
    return [str(epoch) for (epoch,) in rows] or ["first"]


@dataclass(frozen=True)
class _State:
    """What rounds have led to; ``forget`` and ``holdout`` are the mean losses they began at."""

    done: int = 0
    reached: bool = True
    forget: float = 0.0
    holdout: float | None = None
    total: Tensor | None = None


def _keep(file: Path, state: _State) -> None:
    assert state.total is not None
    facts = {name: value for name, value in vars(state).items() if name != "total"}
    make_folder(file.parent)
    temporary = file.with_name(f".tmp-{file.name}")
    write_durably(temporary, [save({"total": state.total}, {"state": json.dumps(facts)})])
    replace_durably(temporary, file)


def _resume(file: Path | None) -> _State:
    """What an earlier attempt at the same request kept; a new state if there is none."""
    if file is None or not file.exists():
        return _State()
    try:
        with safe_open(file, "pt") as kept:
            facts, total = json.loads(kept.metadata()["state"]), kept.get_tensor("total")
        return _State(**facts, total=total)
    except (SafetensorError, LookupError, ValueError, TypeError):
        return _State()  # damaged: begun anew
