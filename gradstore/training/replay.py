"""A run taken apart again: its start, data in order and settings, to train it once more."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from gradstore.errors import ForgetError, GradstoreError
from gradstore.identity import digest_folder, digest_weights
from gradstore.store.store import Store
from gradstore.training.ingest import Progress, TrainingSettings, environment, train
from gradstore.training.model import start_again


@dataclass(frozen=True)
class Replay:
    """What training a run again takes.

    ``tokens`` are the training data's token ids, (t,) int64 each, in the order they were given;
    ``environment`` is what the run trained in, ``notes`` name what differs from it now.
    """

    model: Any
    tokens: Mapping[str, Tensor]
    settings: TrainingSettings
    environment: Mapping[str, Any]
    notes: list[str]


def prepare(store: Store, run: Mapping[str, Any]) -> Replay:
    """Load what training ``run`` (a row of ``runs``) again needs.

    Raises :class:`ForgetError` where the store does not know it, or the start is not what it was.
    """
    if not replayable(run):
        raise ForgetError(
            f"{run['name']} cannot be replayed: the store does not know where it started from "
            "(only finished runs of `gradstore ingest` do, since it keeps that); train again "
            "without the record: `gradstore ingest DATA -s STORE --model START --out NEW`"
        )
    known = json.loads(run["settings"])
    names = {field.name for field in fields(TrainingSettings)} - {"save_checkpoints", "save_steps"}
    settings = TrainingSettings(**{name: known[name] for name in names if name in known})
    tokens = _tokens(store, run)
    if (steps := _steps(len(tokens), settings)) != run["steps"]:
        raise ForgetError(
            f"{run['name']} took {run['steps']} optimizer steps, but its settings make {steps}: it "
            "was resumed with others, or trained by several processes, and cannot be replayed; "
            "train again without the record, with `gradstore ingest`"
        )
    then, now = known["environment"], environment()
    notes = [
        f"{run['name']} was trained with {name} {then[name]}, this is {now.get(name)}: last bits "
        "may differ from its training's"
        for name in then
        if name != "threads" and then[name] != now.get(name)
    ]
    return Replay(_start(run, known["start"], then), tokens, settings, then, notes)


def replayable(run: Mapping[str, Any]) -> bool:
    """Whether the store knows where a run started from, and that it came to its end."""
    settings = json.loads(run["settings"] or "{}")
    return bool(settings.get("start")) and run["status"] == "finished"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that a run saved after so many optimizer steps."""

    step: int
    path: Path
    digest: str


def last_before(store: Store, run: Mapping[str, Any], sample_ids: Sequence[int]) -> Saved | None:
    """The last checkpoint that a run saved before it met any of these samples, if it is there.

    None where their first meetings were not captured. Its files may have changed since.
    """
    first = store.rows(
        """SELECT min(step) FROM exposures WHERE run_id = ? AND list_contains(?, sample_id)
           GROUP BY sample_id HAVING min(epoch) = 1""",
        [run["run_id"], list(sample_ids)],
    )
    if len(first) < len(sample_ids) or not store.has("checkpoints"):
        return None
    kept = store.rows(
        "SELECT step, path, digest FROM checkpoints WHERE run_id = ? AND step < ? ORDER BY step",
        [run["run_id"], min(step for (step,) in first)],
    )
    there = [Saved(step, Path(path), digest) for step, path, digest in kept if Path(path).is_dir()]
    return there[-1] if there else None


def cost(run: Mapping[str, Any], saved: Saved | None = None) -> str:
    """How long training a finished run again takes, by what it took: ``about 12 minutes, ...``.

    Only what came after ``saved``, if it goes on from there.
    """
    steps = run["steps"] - (saved.step if saved else 0)
    seconds = (run["finished_at"] - run["started_at"]).total_seconds() * steps / run["steps"]
    units = (("hour", 3600), ("minute", 60), ("second", 1))
    unit, size = next(each for each in units if seconds >= 2 * each[1] or each[1] == 1)
    count = max(1, round(seconds / size))
    return f"about {count} {unit}{'s' * (count > 1)}, {steps} steps"


def parent(store: Store, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The run of this store whose checkpoint a run started from."""
    start = json.loads(run["settings"] or "{}").get("start") or {}
    found = store.table(
        "SELECT * FROM runs WHERE checkpoint = ? AND run_id < ? ORDER BY run_id DESC LIMIT 1",
        [start.get("model"), run["run_id"]],
    )
    return found[0] if found else None


def train_without(
    store: Store,
    run: Mapping[str, Any],
    replay: Replay,
    samples: Mapping[str, int],
    progress: Callable[[str], None],
    steps: Progress | None = None,
) -> list[str]:
    """Train ``replay.model`` as ``run`` was, without samples; returns what is to be noted."""
    notes = []
    saved = last_before(store, run, list(samples.values()))
    if saved and digest_folder(saved.path) != saved.digest:
        notes.append(f"{saved.path} is not what {run['name']} saved: trained from the start")
        saved = None
    since = f" from {saved.path.name}" if saved else ""
    progress(
        f"training {run['name']} again{since} without {len(samples)} of its records: "
        f"{cost(run, saved)}"
    )
    with _threads(replay.environment["threads"]), TemporaryDirectory() as scratch:
        nothing = Path(scratch)  # is written there: the replay saves no checkpoints
        train(
            replay.model, replay.tokens, nothing, replay.settings, without=samples,
            resume=saved.path if saved else False, progress=steps,
        )  # fmt: skip
    return notes


def _start(run: Mapping[str, Any], start: Mapping[str, Any], then: Mapping[str, Any]) -> Any:
    where = start.get("model", "a fresh model of its config and seed")
    again = "put back what was there, then run the same command again"
    try:
        model = start_again(start)
    except GradstoreError as error:
        raise ForgetError(
            f"{run['name']} started from {where}, now: {error} To replay it, {again}"
        ) from error
    found = digest_weights(model)
    if found != start["digest"]:
        if "config" in start:
            again = f"`pip install torch=={then['torch']} transformers=={then['transformers']}`"
        raise ForgetError(
            f"{run['name']} started from {where}, whose weights are no longer the same: SHA-256 "
            f"{found[:12]}, expected {start['digest'][:12]}; {again}"
        )
    return model


def _tokens(store: Store, run: Mapping[str, Any]) -> dict[str, Tensor]:
    """The training data in the order it was given."""
    kept = store.rows(
        "SELECT segment_id FROM segments WHERE run_id = ? AND kind = 'order'", [run["run_id"]]
    )
    hashes = store.segment(kept[0][0]).tensor("order").tolist() if kept else []
    met = {
        key: (sample, number)
        for sample, number, key in store.rows(
            """SELECT DISTINCT id, sample_id, id_hash FROM exposures JOIN samples USING (sample_id)
               WHERE run_id = ?""",
            [run["run_id"]],
        )
    }
    order = [met.get(key % (1 << 64)) for key in hashes]
    if not order or None in order:
        raise ForgetError(
            f"{run['name']} cannot be replayed: the store has {len(met)} of the {len(hashes)} "
            "records it was trained on; train again without the record, with `gradstore ingest`"
        )
    places = [place for place in order if place is not None]
    tokens = store.tokens([number for _, number in places], run["run_id"])
    return {sample: tokens[number].long() for sample, number in places}


def _steps(samples: int, settings: TrainingSettings) -> int:
    """Optimizer steps that a Trainer takes in one process."""
    batches = -(-samples // settings.batch_size)
    return settings.epochs * -(-batches // settings.accumulate)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Sum in the order in which the run summed: it depends on the number of threads."""
    own = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(own)
