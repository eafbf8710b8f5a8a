"""How a run met samples: exposures as they are stored, and others recomputed at checkpoints."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from torch import nn

from gradstore.capture.layers import BLOCKS, matching, some_of, split
from gradstore.capture.schedule import Schedule
from gradstore.errors import ForgetError
from gradstore.factored import FactoredGradient
from gradstore.identity import identify
from gradstore.store.record import Record
from gradstore.store.store import Store
from gradstore.training.model import load_model
from gradstore.unlearn.controls import gradients

T = TypeVar("T")
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


def met_by(
    store: Store,
    run: dict[str, Any],
    sample_ids: Sequence[int],
    checkpoints: Sequence[Path] = (),
    layers: Sequence[str] = ("embedding",),
    epochs: str = "all",
) -> Iterator[Met]:
    """Exposures that are :func:`stored`, and with checkpoints those :func:`recomputed` there."""
    yield from stored(store, run, sample_ids, layers, epochs)
    if checkpoints:
        yield from recomputed(store, run, sample_ids, checkpoints, layers)


def met_at(
    store: Store,
    run: dict[str, Any],
    sample_ids: Sequence[int],
    checkpoints: Sequence[Path] = (),
    epochs: str = "all",
) -> list[Sequence[int]]:
    """The ``steps`` of exposures that :func:`met_by` yields, without their gradients."""
    rows = store.rows(
        """SELECT id, epoch, step FROM exposures JOIN samples USING (sample_id)
           WHERE run_id = ? AND list_contains(?, sample_id) ORDER BY id, epoch""",
        [run["run_id"], list(sample_ids)],
    )
    found: list[Sequence[int]] = [[step] for *_, step in _wanted(epochs, rows, lambda row: row[:2])]
    if checkpoints:
        captured = defaultdict[str, set[int]](set)
        for sample, epoch, _ in rows:
            captured[sample].add(epoch)
        every = epochs_of(store, run)
        found += [of[-1] for known in captured.values() for of in every if of[0] not in known]
    return found


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
    tokens = store.tokens([number for _, number, *_ in known], run["run_id"])
    weights = weights_of(store, run, layers)
    for checkpoint, of_checkpoint in nearest(store, run, checkpoints).items():
        network = None
        for sample, number, share, captured, _ in known:
            missing = [epoch for epoch in of_checkpoint if epoch[0] not in captured]
            if not missing:
                continue
            if network is None:
                network = saved(checkpoint, store)
            found = {
                name: FactoredGradient.of_dense(dense.detach().cpu())
                for name, dense in gradients(network, [tokens[number]], weights).items()
            }
            for epoch, _, rate, scale, steps in missing:
                later = fmean(after[step] for step in steps)
                yield Met(sample, epoch, steps, rate, scale * share, later, found)


def nearest(
    store: Store, run: dict[str, Any], checkpoints: Sequence[Path]
) -> dict[Path, list[tuple[Any, ...]]]:
    """The epochs, as :func:`epochs_of` has them, to whose middle each checkpoint is nearest.

    Raises :class:`ForgetError` for a folder that is no checkpoint of the run.
    """
    at = {_step_of(path, store, run): path for path in checkpoints}
    served = defaultdict[Path, list[tuple[Any, ...]]](list)
    for epoch in epochs_of(store, run):
        served[at[min(at, key=lambda step: abs(step - epoch[1]))]].append(epoch)
    return served


def saved(checkpoint: Path, store: Store) -> nn.Module:
    """The model of a checkpoint; raises :class:`ModelError` for another than the store's."""
    network: nn.Module = load_model(checkpoint)
    store.model.check(identify(network, None), str(checkpoint))
    return network


def epochs_of(store: Store, run: dict[str, Any]) -> list[tuple[Any, ...]]:
    """A run's epochs: number, mean step, mean learning rate, mean clipping factor, all steps.

    Raises :class:`ForgetError` for a run that kept no list of its steps.
    """
    found = []
    if store.has("steps"):
        found = store.rows(
            """SELECT epoch, avg(step), avg(learning_rate), avg(grad_scale), list(step) FROM steps
               WHERE run_id = ? GROUP BY epoch ORDER BY epoch""",
            [run["run_id"]],
        )
    if not found:
        raise ForgetError(
            f"{run['name']} kept no list of its steps, so its epochs are not known; leave "
            "--from-checkpoints out"
        )
    return found


def records(
    store: Store, run: dict[str, Any], sample_ids: Sequence[int], epochs: str = "all"
) -> list[Record]:
    """Stored records by sample and epoch, of the epochs that a :class:`Schedule` wants.

    Raises :class:`ForgetError` for a sample without any.
    """
    first = epochs == "first"  # then the others need not be read
    known = store.records(sample_ids, run["run_id"], first_only=first)
    found = _wanted(epochs, known, lambda record: (record.exposure.id, record.exposure.epoch))
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


def _wanted(epochs: str, met: Iterable[T], where: Callable[[T], tuple[str, int]]) -> list[T]:
    """Those that a :class:`Schedule` wants of exposures by epoch, given their sample and epoch."""
    schedule, seen, found = Schedule.parse(epochs), defaultdict[str, set[int]](set), list[T]()
    for each in met:
        sample, epoch = where(each)
        if schedule.wants(epoch, seen[sample]):
            seen[sample].add(epoch)
            found.append(each)
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
