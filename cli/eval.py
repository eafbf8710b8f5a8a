"""``gradstore eval``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from .benchmark import show_benchmark
from .options import optional_store_option, output_options, parsed
from .output import emit_sections, hush, say

if TYPE_CHECKING:
    from gradstore.evaluate.evaluation import Evaluation

FAILED_CHECK = 3
_OF_STORES = {
    "store_path", "attacks", "secrets", "candidates", "relearn_steps", "relearn_lr", "relearn_on",
    "general", "run", "seed", "dry_run",
}  # fmt: skip
_OF_ATTACKS = {"relearn": {"relearn_steps", "relearn_lr", "relearn_on"}, "exposure": {"candidates"}}
_checkpoint = click.Path(path_type=Path)


def _template(text: str) -> None:
    from gradstore.evaluate.tofu import check_template

    check_template(text)


def _share(text: str) -> None:
    from gradstore.evaluate.attacks import share_of

    share_of(text)


@click.command(name="eval")
@click.argument("what", nargs=-1, required=True)
@optional_store_option
@click.option(
    "--model", "models", type=_checkpoint, multiple=True, help="Checkpoint after forgetting."
)
@click.option(
    "--original", "--before", "originals", type=_checkpoint, multiple=True, help="One before it."
)
@click.option(
    "--reference",
    "references",
    type=_checkpoint,
    multiple=True,
    help="Checkpoint that never saw the forgotten (`gradstore forget --exact` trains one). Repeat "
    "it, --model and --original with checkpoints of other seeds to compare many with many.",
)
@click.option(
    "--attack",
    "attacks",
    type=click.Choice(["relearn", "quantize", "extract", "exposure"]),
    multiple=True,
    help="Train a little on some of the forgotten and watch the rest; round the weights to bf16 "
    "and int8; ask for the records' secrets, by greedy decoding and beam search; rank these among "
    "random strings. Repeatable.",
)
@click.option(
    "--secrets",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="For extract and exposure: JSON lines with id, prompt and secret (what follows prompt "
    "and blank).",
)
@click.option(
    "--candidates",
    type=click.IntRange(min=2),
    default=1024,
    show_default=True,
    help="For exposure: how many strings of its form a secret is ranked among.",
)
@click.option(
    "--relearn-steps",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Optimizer steps of relearn.",
)
@click.option(
    "--relearn-on",
    metavar="N%|holdout",
    callback=parsed(_share),
    help="What it teaches: a share of the forgotten, at least one record (of a single one, its "
    "beginning), watching the rest; or held-out records, watching all of the forgotten.  "
    "[default: 50%]",
)
@click.option(
    "--relearn-lr",
    type=click.FloatRange(min=0, min_open=True),
    help="Its learning rate.  [default: a fortieth of the run's]",
)
@click.option(
    "--general",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Text file, unrelated to the forgotten, to measure loss and perplexity on.",
)
@click.option("--run", help="Run whose samples to measure.  [default: the one --model comes from]")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Draws the retained and held-out samples that are measured.",
)
@click.option("--dry-run", is_flag=True, help="Measure and show, write nothing.")
@click.option(
    "--benchmark",
    type=click.Choice(["tofu", "lume"]),
    help="Measure on a public benchmark's files instead: WHAT is their folder, and checkpoints.",
)
@click.option(
    "--records", type=click.IntRange(min=1), help="Its first records of each set.  [default: all]"
)
@click.option("--split", help="For tofu: forget01, forget05 or forget10.  [default: forget10]")
@click.option(
    "--template",
    callback=parsed(_template),
    help="For tofu: how to ask.  [default: 'Question: {question}\\nAnswer: {answer}']",
)
@output_options
def eval_(
    what: tuple[str, ...],
    store_path: Path | None,
    models: tuple[Path, ...],
    originals: tuple[Path, ...],
    references: tuple[Path, ...],
    attacks: tuple[str, ...],
    secrets: Path | None,
    candidates: int,
    relearn_steps: int,
    relearn_lr: float | None,
    relearn_on: str | None,
    general: Path | None,
    run: str | None,
    seed: int,
    dry_run: bool,
    benchmark: str | None,
    records: int | None,
    split: str | None,
    template: str | None,
    output: str,
) -> None:
    """Gather evidence about a checkpoint after forgetting, and keep it in the catalog.

    WHAT are numbers of forget requests, or ids of samples (or beginnings that only one has).
    Everything is measured on the forgotten, on samples that stay (those nearest to the forgotten,
    and others at random) and on held-out ones; intervals are 95 % bootstrap. SQL finds it in the
    view evidence.

    With --reference it is checked, and exit code 3 says that one of these failed:

    \b
      membership  AUC of the forgotten against held-out losses lies within the reference's interval
      nearer      KL to the reference is below KL to the --original, with its whole interval
      relearning  (--attack relearn) the loss of what was not taught again does not fall faster
                  than the reference's, by more than that deviates over three seeds
      rounding    (--attack quantize, --original) in bf16 and int8 the forgotten's loss and KL are
                  nearer to the reference's than to the original's, as they were before; not
                  judged where they were not
      extraction  (--attack extract) neither greedy decoding nor beam search says a secret that
                  the reference does not say

    --attack exposure gives bits: log2 of --candidates for the likeliest of all, about 1.4 on
    average for random digits or letters that were never seen.

    With several --model, --original and --reference, the first of each is what all else is about:

    \b
      klom    KL between margins' histograms over the models and over the references
      lira    chance that the model was trained with the record, as several originals and
              references tell
      u_lira  share of models that an attacker classes rightly as forgot or never saw; 0.5 is ideal

    \b
    Examples:
      gradstore eval 1 -s store --model forgotten --original trained
      gradstore eval 1 -s store --model forgotten --original trained --reference retrained \\
          --attack relearn --attack quantize
      gradstore eval p-0007 -s store --model forgotten --attack extract --secrets people.jsonl
      gradstore eval 1 -s store --model forgotten --original trained --general novel.txt
      gradstore eval --benchmark tofu TOFU forgotten --before trained --reference retrained
      gradstore eval --benchmark lume LUME forgotten
    """
    _check_options(benchmark, store_path, models)
    if benchmark is not None:
        folder, *named = map(Path, what)
        if len(originals) > 1 or len(references) > 1:
            raise click.UsageError("--benchmark takes one --original and one --reference at most")
        checkpoints = {
            str(path.resolve() if str(path) in ("original", "reference") else path): path
            for path in (*named, *models)
        }
        if not checkpoints:
            raise click.UsageError("name a checkpoint after the benchmark's folder")
        before = dict(zip(["original"], originals, strict=False))
        columns = before | checkpoints | dict(zip(["reference"], references, strict=False))
        show_benchmark(benchmark, folder, columns, records, split, template, output)
        return
    assert store_path is not None
    if bool({"extract", "exposure"} & {*attacks}) != (secrets is not None):
        raise click.UsageError("--attack extract (or exposure) and --secrets FILE need each other")
    from gradstore.store import Store

    store = Store.open(store_path)

    hush()

    from gradstore.evaluate.attacks import share_of
    from gradstore.evaluate.evaluation import EvaluateSettings, evaluate
    from gradstore.evaluate.extraction import read_secrets

    settings = EvaluateSettings(
        attacks,
        None if secrets is None else read_secrets(secrets),
        relearn_steps,
        relearn_lr,
        run,
        seed,
        share_of(relearn_on or "50%"),
        general,
        candidates,
    )
    given = {"original": originals, "model": models, "reference": references}
    one = {name: paths[0] for name, paths in given.items() if paths}
    more = {name: paths[1:] for name, paths in given.items() if paths[1:]}
    found = evaluate(
        store, what, settings=settings, **one, more=more, dry_run=dry_run, progress=say
    )
    emit_sections(_sections(found, output), output, main="metrics")
    if found.evaluation_id is not None:
        say(f"evaluation {found.evaluation_id} is in the catalog")
    if found.failed:
        say(f"does not hold against the reference: {', '.join(found.failed)}")
        raise SystemExit(FAILED_CHECK)


def _check_options(
    benchmark: str | None, store_path: Path | None, models: tuple[Path, ...]
) -> None:
    """Refuse what does not go together, and miss what is needed."""
    context = click.get_current_context()
    given = {
        name
        for name in context.params
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    if benchmark is None:
        if store_path is None or not models:
            raise click.UsageError("give the store and the checkpoint: -s STORE --model CHECKPOINT")
        if given & {"records", "split", "template"}:
            raise click.UsageError("--records, --split and --template belong to --benchmark")
        for attack, own in _OF_ATTACKS.items():
            if (lost := sorted(given & own)) and attack not in context.params["attacks"]:
                name = lost[0].replace("_", "-")
                raise click.UsageError(f"--{name} belongs to --attack {attack}: give that too")
    elif given & _OF_STORES:
        raise click.UsageError(
            "--benchmark reads no store: it has no --store, --attack, --secrets, --candidates, "
            "--relearn-steps, --relearn-lr, --relearn-on, --general, --run, --seed or --dry-run"
        )
    elif benchmark == "lume" and given & {"split", "template"}:
        raise click.UsageError("--split and --template belong to --benchmark tofu")


def _sections(found: Evaluation, output: str) -> dict[str, list[dict[str, Any]]]:
    names = [n for n in ("original", "model", "reference") if n in found.figures[0].values]
    rows = []
    for figure in found.figures:
        row: dict[str, Any] = {
            "metric": figure.metric,
            "role": figure.role,
            "samples": figure.samples,
        }
        for name in names:
            estimate = figure.values.get(name)
            value, low, high = (None,) * 3 if estimate is None else estimate.as_tuple()
            if output == "table":
                row |= {name: value, f"{name} 95 %": _between(low, high)}
            else:
                row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    steps = range(len(next(iter(found.curves.values()))[0]) if found.curves else 0)
    relearning = []
    for step in steps:
        row = {"step": step}
        for name, curves in found.curves.items():
            at = [curve[step] for curve in curves]
            row |= {name: sum(at) / len(at), f"{name}_low": min(at), f"{name}_high": max(at)}
        relearning.append(row)
    return {
        "metrics": rows,
        "relearning": relearning,
        "checks": [vars(check) for check in found.checks],
        "said": [{"said": each} for each in found.said],
    }


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None or math.isnan(low) else f"{low:.3g} to {high:.3g}"
