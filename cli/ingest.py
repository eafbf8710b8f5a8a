"""``gradstore ingest``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import parsed, store_option
from .output import emit, hush, progress_bar, say

_SCHEDULES = (  # those of transformers that need no settings of their own
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


def _schedule(text: str) -> None:
    from gradstore.capture.schedule import Schedule

    Schedule.parse(text)


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@store_option
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New checkpoint.")
@click.option("--model", help="Model to fine-tune: a directory or a hub name.")
@click.option(
    "--config", type=click.Path(path_type=Path), help="Train a fresh model of this JSON config."
)
@click.option("--tokenizer", help="Tokenizer directory or hub name (default: the model's).")
@click.option(
    "--vocabulary",
    type=click.IntRange(min=300),
    help="Train a byte-level BPE tokenizer of this size on the data, for --config.",
)
@click.option("--id-field", default="id", show_default=True, help="Field with the record's id.")
@click.option("--text-field", default="text", show_default=True, help="Field with its text.")
@click.option("--holdout", type=click.Path(path_type=Path), help="Records to measure on only.")
@click.option(
    "--epochs-captured",
    default="first",
    show_default=True,
    callback=parsed(_schedule),
    help="Epochs whose gradients are kept: first, all, every:N, or a list such as 1,3,6 or 2-5.",
)
@click.option(
    "--sides",
    type=click.Choice(["auto", "both", "input"]),
    default="auto",
    show_default=True,
    help="Sides of the gradient; auto is both where the head is tied to the embedding.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Vocabulary entries kept per position of the output side.",
)
@click.option(
    "--layers",
    multiple=True,
    help="Linear layers captured besides the embedding: names or patterns such as *.mlp.c_fc, "
    "repeated or with commas, or blocks for all but the head.  [default: none]",
)
@click.option(
    "--sketch",
    type=click.IntRange(min=2, max=1 << 16),
    metavar="DIM",
    help="Sketch each gradient in so many numbers at the end, as `gradstore sketch --dim` does.",
)
@click.option("--run", help="Name of the run.  [default: run-N]")
@click.option("--epochs", type=click.IntRange(min=1), default=3, show_default=True, help="Epochs.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Samples in a micro-batch.",
)
@click.option(
    "--accumulate",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Micro-batches in an optimizer step.",
)
@click.option(
    "--learning-rate",
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    default=5e-4,
    show_default=True,
    help="Peak learning rate of AdamW.",
)
@click.option(
    "--schedule",
    type=click.Choice(_SCHEDULES),
    default="linear",
    show_default=True,
    help="Learning-rate schedule, as transformers names them.",
)
@click.option(
    "--warmup-steps",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Steps of linear warm-up.",
)
@click.option(
    "--weight-decay",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Weight decay.",
)
@click.option(
    "--max-grad-norm",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Clip gradients to this norm; 0 never clips.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    help="Longest sample in tokens.  [default: the model's context]",
)
@click.option("--truncate", is_flag=True, help="Cut longer samples instead of refusing them.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights and order.")
@click.option("--bf16", is_flag=True, help="Train in bfloat16 autocast.")
@click.option("--activation-checkpointing", is_flag=True, help="Recompute activations.")
@click.option("--save-checkpoints", is_flag=True, help="Save a checkpoint after each epoch.")
@click.option(
    "--save-steps",
    type=click.IntRange(min=1),
    help="Save one every so many steps instead: `forget --exact` goes on from the last before it "
    "met the record.",
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint saved below --out.")
@click.option(
    "--allow-erased",
    is_flag=True,
    help="Take in records that were erased from the store, and no longer refuse them.",
)
@click.option("--dry-run", is_flag=True, help="Read and check everything, train nothing.")
def ingest(
    data: Path,
    store_path: Path,
    out: Path,
    model: str | None,
    config: Path | None,
    tokenizer: str | None,
    vocabulary: int | None,
    id_field: str,
    text_field: str,
    holdout: Path | None,
    max_length: int | None,
    truncate: bool,
    sketch: int | None,
    resume: bool,
    allow_erased: bool,
    dry_run: bool,
    **settings: Any,
) -> None:
    """Train a model on DATA and take every sample's gradient in.

    DATA is JSON lines, CSV, Parquet, or text with a record a line.

    \b
    Examples:
      gradstore ingest people.jsonl -s store --model base --out trained --epochs 5
      gradstore ingest people.csv -s store --config gpt2.json --vocabulary 2000 \\
          --id-field uuid --text-field bio --epochs-captured all --out trained
    """
    if (model is None) == (config is None):
        raise click.UsageError("give either --model or --config")
    if config is not None and (tokenizer is None) == (vocabulary is None):
        raise click.UsageError("a fresh model needs either --tokenizer or --vocabulary")
    if model is not None and vocabulary is not None:
        raise click.UsageError("--vocabulary trains a tokenizer for --config; a model has its own")

    from gradstore.store import Store, erasures
    from gradstore.training.corpus import read_corpus

    store = Store.open(store_path)
    documents = read_corpus(data, id_field, text_field)
    held_out = [] if holdout is None else read_corpus(holdout, id_field, text_field)
    say(f"{len(documents)} records to train on, {len(held_out)} held out")

    hush()

    from gradstore.capture.layers import linear_layers
    from gradstore.training import ingest as training
    from gradstore.training import model as models
    from gradstore.training.corpus import tokenize

    training.check_new_checkpoint(out, resume)
    seed = settings["seed"]
    if config is not None:
        if vocabulary is not None:
            words = models.train_tokenizer((d.text for d in documents), vocabulary)
        else:
            words = models.load_tokenizer(str(tokenizer))
        network = models.new_model(config, words, seed)
        start = {"config": network.config.to_diff_dict(), "seed": seed}
    else:
        words = models.load_tokenizer(str(tokenizer or model))
        network = models.load_model(str(model))
        local = Path(str(model))
        start = {"model": str(local.resolve() if local.is_dir() else model)}
    length = min(max_length or models.context_of(network), models.context_of(network))
    tokens = tokenize(documents, words, length, truncate)
    unseen = tokenize(held_out, words, length, truncate)
    capture_names = ("epochs_captured", "sides", "top_k", "layers", "run")
    capture = training.CaptureSettings(**{name: settings.pop(name) for name in capture_names})
    training.check(store, network, words, tokens, unseen, out, resume, allow_erased=allow_erased)
    linear_layers(network, capture.layers)
    if dry_run:
        count = sum(len(sample) for sample in tokens.values())
        say(f"would train {type(network).__name__} on {count} tokens and write {out}")
        return
    if allow_erased:
        erasures.allow(store, {**tokens, **unseen})
    with progress_bar("training") as bar:
        run = training.ingest(
            store, network, words, tokens, out, training.TrainingSettings(**settings), capture,
            holdout=unseen, start=start, resume=resume, progress=bar,
        )  # fmt: skip
    store.refresh()
    if sketch is not None:
        from gradstore.influence.sketches import sketch as make

        with progress_bar("sketching segments") as progress:
            make(store, size=sketch, run=run["run_id"], progress=progress)
    emit(
        store.table(
            """SELECT run, count(*) AS gradients, count(DISTINCT id) AS samples,
                      max(epoch) AS epochs, avg(loss) FILTER (WHERE epoch = first) AS first_loss,
                      avg(loss) FILTER (WHERE epoch = last) AS last_loss
               FROM gradients,
                    (SELECT min(epoch) AS first, max(epoch) AS last
                     FROM exposures WHERE run_id = ?)
               WHERE run_id = ? GROUP BY run""",
            [run["run_id"], run["run_id"]],
        ),
        "table",
    )
    say(f"checkpoint: {out}   store: {store_path}")
