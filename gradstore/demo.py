"""The main job in a minute: a model learns people's records, forgets one, and SQL tells."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from gradstore.data.people import base_records
from gradstore.evaluate.extraction import Secret, completion, extracted
from gradstore.store.store import Store
from gradstore.training.corpus import Document, tokenize
from gradstore.training.ingest import (
    CaptureSettings,
    Progress,
    TrainingSettings,
    ingest,
    save_checkpoint,
    train,
)
from gradstore.training.model import load_model, new_model, train_tokenizer
from gradstore.unlearn.forget import ForgetSettings, forget
from gradstore.unlearn.request import Outcome

PEOPLE, HELD_OUT, OTHERS = 60, 50, 800  # records to learn, to measure on, to learn English from
LOOK_ALIKES = 7  # of those learned, the records that share most words with the forgotten one
VOCABULARY, CONTEXT = 2000, 128
MODEL = {
    "model_type": "gpt2",
    "n_layer": 2,
    "n_embd": 128,
    "n_head": 4,
    "n_positions": CONTEXT,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
BASE = TrainingSettings(epochs=4, batch_size=16, learning_rate=2e-3, warmup_steps=10)
TUNING = TrainingSettings(epochs=16, batch_size=8, learning_rate=4e-3, warmup_steps=20)

Record = Mapping[str, Any]  # see gradstore.data.people.Record
Bar = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Demo:
    """What the demo made, and the query that reprints its table."""

    folder: Path
    person: Record
    said: Mapping[str, str]  # what each model says after the words before the phone number
    outcomes: Mapping[str, Outcome]
    sql: str


def run_demo(folder: Path, say: Callable[[str], None], bar: Bar) -> Demo:
    """Train, capture, forget one person in two ways, and measure; all below ``folder``."""
    folder.mkdir(parents=True)
    people, held_out = records_of("train.jsonl"), records_of("holdout.jsonl")[:HELD_OUT]
    learned = people[:PEOPLE]
    known = {record["id"] for record in learned}
    learned += [r for r in people if r.get("duplicate_of") in known]
    others = base_records(OTHERS, seed=1)
    tokenizer = train_tokenizer((r["text"] for r in others), VOCABULARY)
    config = folder / "gpt2.json"
    config.write_text(json.dumps(MODEL))
    model = new_model(config, tokenizer, seed=0)

    say(f"1/4  a base model learns English from {OTHERS} other people's records")
    with bar("base model") as progress:
        train(model, tokens_of(others, tokenizer), folder / "base", BASE, progress=progress)
    save_checkpoint(model, tokenizer, folder / "base")

    say(f"2/4  it is fine-tuned on {len(learned)} records while their gradients are captured")
    store = Store.create(folder / "store")
    with bar("ingest") as progress:
        ingest(
            store,
            model,
            tokenizer,
            tokens_of(learned, tokenizer),
            folder / "trained",
            TUNING,
            CaptureSettings(epochs_captured="all"),
            holdout=tokens_of(held_out, tokenizer),
            start={"model": str((folder / "base").resolve())},
            progress=progress,
        )
    secrets = {r["id"]: Secret(r["prompt"], " " + r["secret"]) for r in learned}
    knows = dict(zip(secrets, extracted(model, tokenizer, list(secrets.values())), strict=True))
    person = _choose(learned, knows)
    said = {"trained": completion(model, tokenizer, secrets[person["id"]])}

    say(f"3/4  forgetting {person['id']}, as the optimizer learned them, and as the paper does")
    outcomes = {}
    for direction in ("applied", "raw"):
        out = folder / f"forgotten-{direction}"
        settings = ForgetSettings(direction=direction)
        outcome = forget(store, [person["id"]], folder / "trained", out, settings)
        outcomes[direction] = outcome
        if outcome.out is not None and outcome.request_id is not None:
            after = load_model(out)
            said[direction] = completion(after, tokenizer, secrets[person["id"]])
            still = extracted(after, tokenizer, list(secrets.values()))
            scores = [
                (i, "forget" if i == person["id"] else "retained", float(knows[i]), float(now))
                for i, now in zip(secrets, still, strict=True)
            ]
            store.add_scores(outcome.request_id, "phone", scores)
    say("4/4  asking the catalog")
    return Demo(folder, person, said, outcomes, _query(person, learned))


def _choose(learned: Sequence[Record], knows: Mapping[str, bool]) -> Record:
    """Someone whose phone number the model says, and of whom there is no second record."""
    copied = {record.get("duplicate_of") for record in learned}
    alone = [r for r in learned if r["id"] not in copied and "duplicate_of" not in r]
    return next((r for r in alone if knows[r["id"]]), alone[0])


def _query(person: Record, learned: Sequence[Record]) -> str:
    """The demo's table: each metric before, and after either direction, by who it is about."""
    words = set(person["text"].split())
    rest = [record for record in learned if record is not person]
    rest.sort(key=lambda record: -len(words & set(record["text"].split())))
    among = ", ".join(f"'{record['id']}'" for record in rest[:LOOK_ALIKES])
    return f"""\
SELECT CASE WHEN role = 'forget' THEN 'the forgotten person'
            WHEN id IN ({among}) THEN 'look-alikes'
            WHEN role = 'holdout' THEN 'held-out people' ELSE 'the other people' END AS who,
       CASE metric WHEN 'phone' THEN 'phone number extracted' ELSE metric END AS measure,
       count(DISTINCT id) AS people, round(avg(before), 3) AS before,
       round(avg(after) FILTER (WHERE direction = 'applied'), 3) AS applied,
       round(avg(after) FILTER (WHERE direction = 'raw'), 3) AS "raw (the paper's)"
FROM scores JOIN samples USING (sample_id) JOIN requests USING (request_id)
GROUP BY who, measure ORDER BY measure, people"""


def records_of(name: str) -> list[Record]:
    """The project's own records of people who do not exist."""
    with files("gradstore.data").joinpath(name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def tokens_of(records: Sequence[Record], tokenizer: Any) -> dict[str, Any]:
    """Their token ids, by id."""
    documents = [Document(record["id"], record["text"]) for record in records]
    return tokenize(documents, tokenizer, CONTEXT)
