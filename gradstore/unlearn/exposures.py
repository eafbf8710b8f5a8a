"""How a run met samples, stored or recomputed at checkpoints, and what its training did after."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from gradstore.capture.layers import BLOCKS, matching, some_of, split
from gradstore.capture.schedule import Schedule
from gradstore.errors import ForgetError
from gradstore.factored import FactoredGradient
from gradstore.identity import identify
from gradstore.store.record import Record
from gradstore.store.store import Store
from gradstore.training.model import load_model
from gradstore.unlearn.controls import gradients

NOT_EVERY_MODEL_HAS = ("!position", "!head")  # so that leaving them out is never wrong


@dataclass(frozen=True)
class Met:
    """One exposure: the optimizer took ``learning_rate`` · ``share`` · gradient (before √v).

    ``steps`` has its step, or all of the epoch where it was not kept; ``after`` is the sum of the
    learning rates of the steps that followed, None where the run kept no list of steps.
    ``share`` is what the sample's summed loss counted in the step, after clipping, ``gradients``
    are those of the weights asked for, by their names.
    """

    id: str
    epoch: int
    steps: Sequence[int]
    learning_rate: float
    share: float
    after: float | None
    gradients: dict[str, FactoredGradient]


def stored(
    store: Store,
    run: dict[str, Any],
    sample_ids: Sequence[int],
    layers: Sequence[str] = ("embedding",),
    epochs: str = "all",
) -> Iterator[Met]:
    """Stored exposures of some epochs. Raises :class:`ForgetError` for a sample without any."""
    after = _rates_after(store, run)
    for record in records(store, run, sample_ids, epochs):
        met = record.exposure
        yield Met(
            met.id,
            met.epoch,
            [met.step],
            met.learning_rate,
            met.batch_share * met.grad_scale,
            after.get(met.step),
            record.gradients(store.model, layers),
        )


def layers_of(store: Store, run: dict[str, Any], patterns: Sequence[str]) -> list[str]:
    """The layers of a run that patterns name: ``embedding``, those it captured besides, ``all``.

    ``blocks`` stands for the linear layers of the blocks, ``position`` and ``head`` for the
    embedding of positions and an untied head; what a pattern after ``!`` names is left out, of all
    if there is no other. Raises :class:`ForgetError` for what the run lacks.
    """
    linear = [layer.layer for layer in store.layers(run["run_id"])]
    known = ["embedding"]
    if store.model.positions is not None:
        known.append("position")
    if run["sides"] == "both" and not store.model.tied:
        known.append("head")
    found: set[str] = set()
    left_out: set[str] = set()
    wanted = split(patterns)
    if wanted and all(each.startswith("!") for each in wanted):
        wanted = ["all", *wanted]
    for asked in wanted:
        pattern = asked.removeprefix("!").strip()
        among = linear if pattern == BLOCKS else known + linear
        matches = matching(among, ["*" if pattern == "all" else pattern])
        if not matches and asked not in NOT_EVERY_MODEL_HAS:
            raise ForgetError(
                f"{run['name']} captured no layer {pattern!r}; it has {some_of(known + linear)} "
                "(others: `gradstore ingest --layers`)"
            )
        (left_out if asked.startswith("!") else found).update(matches)
    if not (found := found - left_out):
        raise ForgetError(f"no layer is left to move; {run['name']} has {some_of(known + linear)}")
    return [name for name in known + linear if name in found]


def weights_of(store: Store, run: dict[str, Any], layers: Sequence[str]) -> list[str]:
    """The weights of some layers, as :meth:`Record.gradients` names them."""
    bias = {layer.layer: layer.bias for layer in store.layers(run["run_id"])}
    return [
        name
        for layer in layers
        for name in (
            [layer]
            if layer not in bias
            else [f"{layer}.weight", *([f"{layer}.bias"] if bias[layer] else [])]
        )
    ]


def recomputed(
    store: Store,
    run: dict[str, Any],
    sample_ids: Sequence[int],
    checkpoints: Sequence[Path],
    layers: Sequence[str] = ("embedding",),
) -> Iterator[Met]:
    """Exposures of the epochs that were not captured, from checkpoints saved while training.

    The gradient is taken at the checkpoint nearest to the middle of the epoch (one forward and
    backward pass a sample and checkpoint), learning rate, clipping and what came after are the
    epoch's means, and the share is the sample's own of the epochs that are stored. ``checkpoints``
    are folders that a ``Trainer`` saved. Raises :class:`ForgetError` for other folders
    and for records of which only a part was stored, :class:`ModelError` for another model.
    """
    if run["sides"] == "input" and store.model.tied:
        raise ForgetError(
            f"{run['name']} stored one side of a tied embedding, a checkpoint gives both: "
            "capture with --sides both, or leave --from-checkpoints out"
        )
    at = {_step_of(path, store, run): path for path in checkpoints}
    after = _rates_after(store, run)
    known = store.rows(
        """SELECT id, sample_id, avg(batch_share), list(epoch), min(scored_tokens = "rows")
           FROM exposures JOIN samples USING (sample_id)
           WHERE run_id = ? AND list_contains(?, sample_id) GROUP BY id, sample_id ORDER BY id""",
        [run["run_id"], list(sample_ids)],
    )
    for sample, _, _, _, whole in known:
        if not whole:
            raise ForgetError(
                f"training counted only some tokens of {sample!r}; a checkpoint gives the gradient "
                "of all: leave --from-checkpoints out"
            )
    served = defaultdict[int, list[tuple[Any, ...]]](list)
    for epoch in epochs_of(store, run):
        served[min(at, key=lambda step: abs(step - epoch[1]))].append(epoch)
    tokens = store.tokens([number for _, number, *_ in known], run["run_id"])
    weights = weights_of(store, run, layers)
    for step, of_checkpoint in served.items():
        network = None
        for sample, number, share, captured, _ in known:
            missing = [epoch for epoch in of_checkpoint if epoch[0] not in captured]
            if not missing:
                continue
            if network is None:
                network = load_model(at[step])
                store.model.check(identify(network, None), str(at[step]))
            found = {
                name: FactoredGradient.of_dense(dense.detach().cpu())
                for name, dense in gradients(network, [tokens[number]], weights).items()
            }
            for epoch, _, rate, scale, steps in missing:
                later = fmean(after[step] for step in steps)
                yield Met(sample, epoch, steps, rate, scale * share, later, found)


def epochs_of(store: Store, run: dict[str, Any]) -> list[tuple[Any, ...]]:
    """A run's epochs: number, mean step, mean learning rate, mean clipping factor, all steps.

    Raises :class:`ForgetError` for a run that kept no list of its steps.
    """
    if not _rates_after(store, run):
        raise ForgetError(
            f"{run['name']} kept no list of its steps, so its epochs are not known; leave "
            "--from-checkpoints out"
        )
    return store.rows(
        """SELECT epoch, avg(step), avg(learning_rate), avg(grad_scale), list(step) FROM steps
           WHERE run_id = ? GROUP BY epoch ORDER BY epoch""",
        [run["run_id"]],
    )


def records(
    store: Store, run: dict[str, Any], sample_ids: Sequence[int], epochs: str = "all"
) -> list[Record]:
    """Stored records by sample and epoch, of the epochs that a :class:`Schedule` wants.

    Raises :class:`ForgetError` for a sample without any.
    """
    schedule, seen, found = Schedule.parse(epochs), defaultdict[str, set[int]](set), []
    first = epochs == "first"  # then the others need not be read
    for record in store.records(sample_ids, run["run_id"], first_only=first):
        met = record.exposure
        if schedule.wants(met.epoch, seen[met.id]):
            seen[met.id].add(met.epoch)
            found.append(record)
    held = {record.exposure.id for record in found}
    for (sample,) in store.rows(
        "SELECT id FROM samples WHERE list_contains(?, sample_id)", [list(sample_ids)]
    ):
        if sample not in held:
            raise ForgetError(
                f"{sample!r} has no gradient in {run['name']}"
                + (f" of --epochs {epochs}: " if epochs not in ("first", "all") else ": ")
                + f"it was held out or never met; see `gradstore show {sample}`"
            )
    return found


def _rates_after(store: Store, run: dict[str, Any]) -> dict[int, float]:
    """For each step of a run the sum of the learning rates that came after it."""
    if not store.has("steps"):
        return {}
    return dict(
        store.rows(
            """SELECT step, coalesce(sum(learning_rate) OVER (
                          ORDER BY step DESC ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0)
               FROM steps WHERE run_id = ?""",
            [run["run_id"]],
        )
    )


def held_after(
    store: Store, run: dict[str, Any], changed: Mapping[int, float] | None = None
) -> dict[int, float]:
    """For each step of a run how firmly the steps after it held the model where it ended.

    Sums their learning rates, times what a step's loss was in units of a mean over tokens, times
    how much larger the squares of gradients (at the embedding's output) were in its epoch than in
    the last. Curvature goes with these (it is their mean where predictions are right on average)
    and shrinks as records are learned. An epoch that was not captured counts as the captured one
    before it, or the first; ``changed``, as :func:`sizes` has it, tells how the squares changed in
    between. Nothing for a run that kept no list of its steps.
    """
    known = {
        epoch: (size, tokens)
        for epoch, size, tokens in store.rows(
            """SELECT epoch, avg(d_norm * d_norm) FILTER (isfinite(d_norm)),
                      sum(batch_share * grad_scale * scored_tokens) / count(DISTINCT step)
               FROM exposures WHERE run_id = ? GROUP BY epoch ORDER BY epoch""",
            [run["run_id"]],
        )
    }
    if not known or not store.has("steps"):
        return {}

    def seen(epoch: int) -> tuple[float | None, float]:
        """Squares of gradients, and what a step's loss was."""
        captured = max((e for e in known if e <= epoch), default=min(known))
        size, tokens = known[captured]
        if size is not None and changed and changed.get(captured):
            size *= changed.get(epoch, changed[captured]) / changed[captured]
        return size, tokens

    steps = store.rows(
        "SELECT step, epoch, learning_rate FROM steps WHERE run_id = ? ORDER BY step DESC",
        [run["run_id"]],
    )
    of = {epoch: seen(epoch) for epoch in dict.fromkeys(epoch for _, epoch, _ in steps)}
    last = next((size for size, _ in of.values() if size is not None), None)
    after, held = dict[int, float](), 0.0
    for step, epoch, rate in steps:
        size, tokens = of[epoch]
        after[step] = held
        held += rate * tokens * (1.0 if size is None or not last else size / last)
    return after


def sizes(
    store: Store, run: dict[str, Any], sample_ids: Sequence[int], checkpoints: Sequence[Path]
) -> dict[int, float]:
    """How large some samples' gradients of the embedding were: their mean square, by epoch.

    As stored, or recomputed at ``checkpoints`` where an epoch was not captured. Samples of which
    training counted only a part are left out.
    """
    whole = [
        number
        for (number,) in store.rows(
            """SELECT sample_id FROM exposures WHERE run_id = ? AND list_contains(?, sample_id)
               GROUP BY sample_id HAVING bool_and(scored_tokens = "rows") ORDER BY sample_id""",
            [run["run_id"], list(sample_ids)],
        )
    ]
    if not whole:
        return {}
    squares = defaultdict[int, list[float]](list)
    met = chain(stored(store, run, whole), recomputed(store, run, whole, checkpoints))
    for each in met:
        squares[each.epoch].append(each.gradients["embedding"].norm() ** 2)
    return {epoch: fmean(of) for epoch, of in squares.items()}


def _step_of(checkpoint: Path, store: Store, run: dict[str, Any]) -> int:
    """The optimizer step a Trainer's checkpoint was saved at."""
    try:
        step = int(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ForgetError(
            f"{checkpoint} is no checkpoint of a Trainer (trainer_state.json: {error}); give the "
            "folders checkpoint-N that `gradstore ingest --save-checkpoints` wrote"
        ) from error
    link = checkpoint / "gradstore-run.json"
    origin = json.loads(link.read_text()) if link.exists() else {}
    if origin and (origin.get("store"), origin.get("run")) != (store.format.store, run["run_id"]):
        raise ForgetError(f"{checkpoint} belongs to another run than {run['name']}; see --run")
    return step
