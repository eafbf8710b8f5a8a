"""What is trained, and which records are asked to be forgotten; models retrained without them."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from gradstore.data.people import base_records, holdout_records, train_records
from gradstore.demo import BASE, MODEL, TUNING, VOCABULARY, tokens_of
from gradstore.training.corpus import Document, read_corpus, tokenize
from gradstore.training.ingest import TrainingSettings, save_checkpoint, train
from gradstore.training.model import load_model, load_tokenizer, new_model, train_tokenizer
from gradstore.unlearn.direction import DIRECTIONS

LENGTH = 128  # tokens; longer texts are cut
AUTHOR = 20  # answers
TRAINING = {
    "lume": TrainingSettings(epochs=12, batch_size=16, learning_rate=1.5e-3),
    "tofu": TrainingSettings(epochs=10, batch_size=12, learning_rate=1e-3),
    "people": TUNING,
}


@dataclass(frozen=True)
class Plan:
    """What is trained, and on how much."""

    text: str
    start: str
    training: TrainingSettings
    people: int = 300
    held_out: int = 200
    layers: int = 4  # of a model made from scratch
    width: int = 128
    alone: int = 4  # records forgotten one at a time
    sets: tuple[int, ...] = (10, 30)
    directions: tuple[str, ...] = DIRECTIONS
    attacks: bool = False
    checkpoints: tuple[int, ...] | None = None  # store one epoch, recompute the rest at so many
    inner: bool = False  # capture the layers of the blocks too


@dataclass(frozen=True)
class Setting:
    """A plan with its data at hand; ``start`` makes the untrained model, the same each time."""

    start: Callable[[], Any]
    tokenizer: Any
    people: dict[str, Tensor]
    passages: dict[str, Tensor]
    held_out: dict[str, Tensor]
    requests: dict[str, list[str]]


@contextmanager
def workplace(plan: Plan, keep: Path | None) -> Iterator[Path]:
    """A folder for a plan's trainings: a temporary one, or a lasting one for its like."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="forgetting-") as folder:
            (Path(folder) / "references").mkdir()
            yield Path(folder)
        return
    asked = ("alone", "sets", "directions", "attacks")
    settled = asdict(plan) | {"checkpoints": plan.checkpoints is not None}
    trains = repr({name: part for name, part in settled.items() if name not in asked})
    work = keep / sha256(trains.encode()).hexdigest()[:12]
    (work / "references").mkdir(parents=True, exist_ok=True)
    (work / "plan.txt").write_text(trains)
    yield work


def setting_of(
    plan: Plan, data: Path | None, folder: Path, console: Console | None = None
) -> Setting:
    passages: list[Document] = []
    if plan.text == "people" or data is None:
        everyone = [Document(r["id"], r["text"]) for r in train_records() if r["kind"] == "record"]
        strange = [Document(r["id"], r["text"]) for r in holdout_records()]
    else:
        everyone = tofu(data) if plan.text == "tofu" else read_corpus(data / "lume/people.jsonl")
        strange = everyone[plan.people :]
    people, held_out = everyone[: plan.people], strange[: plan.held_out]
    if plan.text == "people" or data is None:
        tokenizer = pretrained(folder, console or Console(stderr=True))
        start: Callable[[], Any] = partial(load_model, folder / "base")
    elif plan.start == "tiny":  # fine-tuned on as many passages of what it was pretrained on
        library = read_corpus(data / "corpora" / "public_domain_docs.jsonl")
        passages = random.Random(0).sample(library, len(people) if plan.text == "lume" else 0)
        tokenizer = load_tokenizer(data / "tiny_gpt2")
        start = partial(load_model, data / "tiny_gpt2")
    else:
        tokenizer = load_tokenizer(data / "tokenizer_gpt2")
        shape = {"n_layer": plan.layers, "n_head": 4, "n_embd": plan.width, "n_positions": LENGTH}
        dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        config = folder / "config.json"
        config.write_text(json.dumps({"model_type": "gpt2", **shape, **dropout}))
        start = partial(new_model, config, tokenizer, plan.training.seed)
    members, further, strangers = (
        tokenize(texts, tokenizer, LENGTH, truncate=True) for texts in (people, passages, held_out)
    )
    ids = [person.id for person in people]
    apart = max(1, len(ids) // max(1, plan.alone))
    requests = {one[:8]: [one] for one in ids[::apart][: plan.alone]}
    for number, size in enumerate(plan.sets):
        if plan.text != "tofu":  # evenly spaced: all biographies look alike
            requests[f"{size} together"] = ids[:: len(ids) // size][:size]
        else:  # an author's answers follow one another
            first = (2 * number + 1) * AUTHOR
            requests[f"author {first // AUTHOR}"] = ids[first : first + size]
    return Setting(start, tokenizer, members, further, strangers, requests)


def tofu(data: Path) -> list[Document]:
    """Questions and answers of fictitious authors, twenty each."""
    with (data / "tofu" / "full.json").open(encoding="utf-8") as lines:
        pairs = [json.loads(line) for line in lines]
    return [
        Document(f"qa-{number:04d}", f"Question: {pair['question']}\nAnswer: {pair['answer']}")
        for number, pair in enumerate(pairs)
    ]


def pretrained(folder: Path, console: Console) -> Any:
    """A small GPT-2 that has learned English at ``folder / "base"``; returns its tokenizer."""
    records = base_records(800, seed=1)
    tokenizer = train_tokenizer((r["text"] for r in records), VOCABULARY)
    if not (folder / "base").exists():
        config = folder / "gpt2.json"
        config.write_text(json.dumps(MODEL))
        base = new_model(config, tokenizer, seed=0)
        with watched("a base model learns English", console) as progress:
            train(base, tokens_of(records, tokenizer), folder, BASE, progress=progress)
        save_checkpoint(base, tokenizer, folder / "base")
    return tokenizer


def retrained(
    start: Callable[[], Any],
    texts: Mapping[str, Tensor],
    training: TrainingSettings,
    name: str,
    ids: Sequence[str],
    folder: Path,
    console: Console,
) -> tuple[Any, dict[str, float]]:
    """The model trained again without ``ids``, kept below ``folder``; its cost if it was not yet.

    The same start, order and batches; what the others count in each step is as it was.
    """
    key = sha256(" ".join(sorted(ids)).encode()).hexdigest()[:8]
    where, cost = folder / "references" / f"{'-'.join(name.split())}-{key}", dict[str, float]()
    if not where.exists():
        reference, begun = start(), time.monotonic()
        with watched(f"retraining without {name}", console) as progress:
            alike = replace(training, save_checkpoints=False)
            train(reference, texts, folder / "retraining", alike, without=ids, progress=progress)
        reference.save_pretrained(folder / "retrained")
        where.parent.mkdir(exist_ok=True)
        (folder / "retrained").rename(where)
        cost["retraining"] = time.monotonic() - begun
    return load_model(where), cost


@contextmanager
def watched(what: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; training reports its steps to what it yields."""
    with Progress(console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda step, steps: bar.update(task, completed=step, total=steps)
