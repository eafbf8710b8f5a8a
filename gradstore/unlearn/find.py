"""The direction that a request asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from gradstore.errors import ForgetError, SettingsError
from gradstore.store.store import Store
from gradstore.unlearn import controls
from gradstore.unlearn.applied import applied, orthogonal
from gradstore.unlearn.direction import DIRECTIONS, Direction, raw
from gradstore.unlearn.exposures import layers_of, weights_of
from gradstore.unlearn.held import NOBODY, Held
from gradstore.unlearn.newton import newton
from gradstore.unlearn.unused import Tokens, as_if_unused, tokens_of

HELD = {"newton": 64, "orthogonal": 64}  # by so many samples that stay
HELD_INSIDE = 128  # for ``newton`` of more than the embedding: more directions are to be held


def find(
    kind: str,
    store: Store,
    run: dict[str, Any],
    sample_ids: Sequence[int],
    network: nn.Module,
    *,
    held: Held = NOBODY,
    weights: str | None,
    seed: int,
    checkpoints: Sequence[Path] = (),
    layers: Sequence[str] = ("embedding",),
    epochs: str | None = None,
    tokens: Callable[[], Tokens] | None = None,
) -> Direction:
    """The direction of a kind; ``held`` are samples that stay, for those in ``HELD``.

    ``checkpoints`` complete what was not captured, for ``applied`` and those in ``HELD``.
    ``layers`` are those whose weights move, as :func:`layers_of` reads them, and ``epochs`` the
    stored ones that count (as in :class:`Schedule`; None: the first for ``raw``, else all), but for
    ``fresh`` and ``random``. Where steps of all epochs are undone at dose 1, tokens that nobody
    else uses are treated by :func:`as_if_unused`; ``tokens`` gives them, None: :func:`tokens_of`.

    Raises :class:`ForgetError` for an unknown kind, or what cannot be had from the store, and
    :class:`SettingsError` for layers or epochs that the kind does not have.
    """
    names = layers_of(store, run, layers)
    if names != ["embedding"] and kind not in (several := ("applied", "newton", "raw", "fresh")):
        raise SettingsError(
            f"--direction {kind} moves the embedding only: with --layers give --direction "
            f"{' or '.join(several)}"
        )
    if epochs is not None and kind in ("fresh", "random"):
        raise SettingsError(f"--epochs belongs to directions of stored gradients, not {kind}")
    if kind in HELD and not held.everyone:
        raise ForgetError("nothing stays that could hold the model: give --direction applied")
    if kind in ("applied", *HELD):
        every = epochs or "all"
        if kind == "applied":
            undone = applied(store, run, sample_ids, weights, checkpoints, names, every)
        elif kind == "newton":
            undone = newton(store, run, sample_ids, network, held, checkpoints, names, every)
        else:
            undone = orthogonal(store, run, sample_ids, held.everyone, weights, checkpoints, every)
        if epochs is not None or undone.dose != 1.0:
            return undone
        found = tokens() if tokens else tokens_of(store, run, sample_ids)
        updates, alone = as_if_unused(store, run, network, undone.updates, found)
        return replace(undone, updates=updates, alone=alone)
    if kind not in DIRECTIONS:
        raise ForgetError(f"{kind!r} is no direction; give one of {', '.join(DIRECTIONS)}")
    # refuses what the run was not trained on
    first = raw(store, run, sample_ids, names, epochs or "first")
    if kind == "raw":
        return first
    texts = list(store.tokens(list(sample_ids), run["run_id"]).values())
    if kind == "fresh":
        updates = controls.gradients(network, texts, weights_of(store, run, names))
        return replace(first, kind="fresh", updates=updates)
    noise = controls.random(first.update, texts, seed)
    return replace(first, kind="random", updates={"embedding": noise})
