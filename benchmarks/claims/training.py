"""What is trained for the claims, with every gradient stored, and what that takes on disk."""

from __future__ import annotations

import json
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from retraining.setting import LENGTH, pretrained, watched
from rich.console import Console
from torch import Tensor, nn

from gradstore import Store
from gradstore.demo import TUNING, records_of, tokens_of
from gradstore.training.corpus import read_corpus, tokenize
from gradstore.training.ingest import CaptureSettings, TrainingSettings, ingest
from gradstore.training.model import load_model, load_tokenizer

UNUSED = 300  # biographies that constants of the package were chosen on
Row = dict[str, Any]


@dataclass(frozen=True)
class Profile:
    """How much is done."""

    people: int = 50  # trained on; of LUME with as many passages of books
    held_out: int = 48
    epochs: int = 10
    records: int = 3  # forgotten in each training, one at a time
    seeds: int = 3
    measured: int = 24  # of those that stay, and of the held out
    twice: int = 2  # people with a duplicate, in each training
    others: int = 60  # people without, beside them
    both: bool = True  # biographies and synthetic records, not one of them


@dataclass(frozen=True)
class Cell:
    """One training."""

    text: str  # lume or synthetic
    tied: bool
    seed: int

    @property
    def name(self) -> str:
        """As tables have it."""
        return f"{self.text}{'' if self.tied else ', untied'}"


@dataclass(frozen=True)
class Trained:
    """A training with its store, and what it began from."""

    cell: Cell
    store: Store
    folder: Path
    start: Callable[[], Any]
    texts: Mapping[str, Tensor]
    people: Mapping[str, Tensor]
    held_out: Mapping[str, Tensor]
    settings: TrainingSettings

    @property
    def checkpoint(self) -> Path:
        """The trained model."""
        return self.folder / "trained"


def train_cell(
    cell: Cell, profile: Profile, data: Path | None, folder: Path, console: Console
) -> Trained:
    """Train with every layer captured at every epoch, unless ``folder`` holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    if cell.text == "lume":
        assert data is not None
        everyone = read_corpus(data / "lume" / "people.jsonl")[UNUSED:]
        library = read_corpus(data / "corpora" / "public_domain_docs.jsonl")
        tokenizer, begin = load_tokenizer(data / "tiny_gpt2"), data / "tiny_gpt2"
        parts = everyone[: profile.people], everyone[profile.people :][: profile.held_out]
        people, held_out, passages = (
            tokenize(of, tokenizer, LENGTH, truncate=True)
            for of in (*parts, random.Random(0).sample(library, profile.people))
        )
        settings = TrainingSettings(batch_size=8, learning_rate=1.5e-3)
    else:
        tokenizer, begin = pretrained(folder.parent, console), folder.parent / "base"
        once = [r for r in records_of("train.jsonl") if "duplicate_of" not in r]
        people = tokens_of(once[: profile.people], tokenizer)
        held_out = tokens_of(records_of("holdout.jsonl")[: profile.held_out], tokenizer)
        passages, settings = {}, TUNING
    settings = replace(settings, epochs=profile.epochs, seed=cell.seed)
    if not cell.tied:
        begin = untied(begin, folder / "start")
    start, texts = partial(load_model, begin), people | passages
    if not (folder / "ingested").exists():
        for half in ("store", "trained"):  # of a training that was cut short
            shutil.rmtree(folder / half, ignore_errors=True)
        with watched(f"{cell.name}, seed {cell.seed}: training, with capture", console) as progress:
            ingest(
                Store.create(folder / "store"), start(), tokenizer, texts, folder / "trained",
                settings, CaptureSettings("all", sides="both", layers=("blocks",)),
                holdout=held_out, progress=progress,
            )  # fmt: skip
        (folder / "ingested").touch()
    store = Store.open(folder / "store")
    return Trained(cell, store, folder, start, texts, people, held_out, settings)


def untied(start: Path, folder: Path) -> Path:
    """The same model with a head of its own, a copy of its embedding."""
    if not folder.exists():
        model = load_model(start)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
        model.save_pretrained(folder)
    return folder


def bytes_of(store: Store) -> Row:
    """Bytes on disk of a stored gradient, by the layer that they are for; means."""
    [(count,)] = store.rows("SELECT count(*) FROM exposures")
    totals: dict[str, float] = defaultdict(float)
    for manifest in store.root.glob("segments/*/*/manifest.json"):
        facts = json.loads(manifest.read_text())
        if not facts["tables"].get("exposures", {}).get("rows"):
            continue
        for name, file in facts["files"].items():
            totals[_layer(name.split("/")[0])] += file["bytes"] / count
    return dict(totals)


def _layer(array: str) -> str:
    if array in ("D", "tokens", "scored"):
        return "input side"
    if array in ("H", "R_index", "R_value", "tail"):
        return "output side"
    return array.rpartition(".")[0] or "rest"


def weights_of(trained: Trained) -> Row:
    """Numbers of weights: of the embedding, of the blocks, of all."""
    counts = {name: weight.numel() for name, weight in trained.start().named_parameters()}
    return {
        "embedding": counts["transformer.wte.weight"],
        "blocks": sum(count for name, count in counts.items() if ".h." in name),
        "all": sum(counts.values()),
    }


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, which is kept at ``path`` as JSON and made once."""
    if not path.exists():
        made = json.dumps(make())
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(made)
        unfinished.rename(path)
    return json.loads(path.read_text())
