"""``gradstore forget``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .options import output_options, parsed, store_option
from .output import emit_sections, hush, progress_bar, say

FAILED_CHECK = 3


def _dose(text: str) -> None:
    from gradstore.unlearn.dose import Dose

    Dose.parse(text)


def _epochs(text: str) -> None:
    from gradstore.capture.schedule import Schedule

    Schedule.parse(text)


@click.command()
@click.argument("ids", nargs=-1, required=True)
@store_option
@click.option("--model", type=click.Path(path_type=Path), required=True, help="Checkpoint to use.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New checkpoint.")
@click.option(
    "--direction",
    type=click.Choice(
        ["applied", "newton", "orthogonal", "raw", "fresh", "random", "graddiff", "npo"]
    ),
    help="Undo what is left of the optimizer's steps, as its second moments tell (applied), or "
    "the curvature of samples that stay (newton), or the first without its part along their stored "
    "gradients (orthogonal); ascend first-epoch gradients (raw, the paper's). To compare with: the "
    "gradient at the model as it is (fresh), noise in the samples' rows (random), and steps of "
    "AdamW up the samples and down what stays (graddiff, npo), of the whole model.  "
    "[default: applied for one sample, newton for several or where inner layers were captured]",
)
@click.option(
    "--dose",
    callback=parsed(_dose),
    help="A multiple of the direction, target (loss of a never-trained record, estimated from the "
    "held-out ones), or target:NATS.  [default: 1 (0.5 for applied unless washed), target for raw "
    "and what is to compare with]",
)
@click.option(
    "--weights",
    type=click.Choice(["washed", "rising", "uniform"]),
    help="Weight of each exposure in applied and orthogonal: what training left of it, later "
    "epochs more (dose 0.5), or all alike.  [default: washed, with SGD rising]",
)
@click.option(
    "--epochs",
    callback=parsed(_epochs),
    help="Stored epochs that count, where stored gradients do: first, all, every:N, or a list such "
    "as 1,3-5.  [default: all, for raw first]",
)
@click.option(
    "--from-checkpoints",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    multiple=True,
    help="Recompute epochs that were not captured at this checkpoint of the training; repeatable.",
)
@click.option(
    "--layers",
    multiple=True,
    help="Captured layers whose weights move: names or patterns, repeated or with commas; blocks "
    "for all linear layers, all for everything, ! before what stays as it is.  [default: all for "
    "graddiff and npo; all but position for newton where inner layers were captured; else "
    "embedding]",
)
@click.option(
    "--max-holdout-increase",
    type=click.FloatRange(min=0),
    default=0.1,
    show_default=True,
    help="Stop where the mean held-out loss has risen by more (nats per token).",
)
@click.option(
    "--max-retained-increase",
    type=click.FloatRange(min=0),
    help="Stop where any measured sample that stays has lost more.  [default: none]",
)
@click.option(
    "--max-neighbour-increase",
    type=click.FloatRange(min=0),
    help="Stop where the mean loss of those that stay and are hit most has risen by more.  "
    "[default: none]",
)
@click.option("--run", help="Run whose gradients to use.  [default: the one that wrote --model]")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Draws the retained that are measured, those of the curvature, random's noise, and what "
    "graddiff and npo take up at each step.",
)
@click.option(
    "--exact",
    is_flag=True,
    help="Train the run again from its start with the samples' contribution left out; takes as "
    "long as the training did.",
)
@click.option(
    "--iterate",
    type=click.IntRange(min=1),
    metavar="N",
    help="Reach the target in N rounds, each with the next stored epoch's gradients (--direction "
    "raw) or those of the model as it then is (fresh). Interrupted, the same command goes on.",
)
@click.option(
    "--retained",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="For graddiff and npo: records to keep, in a file as ingest reads it; longer ones are "
    "cut.  [default: those that the store kept of the run]",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="For graddiff and npo: steps at most; they end at the target.  [default: 60]",
)
@click.option(
    "--learning-rate",
    "--lr",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="For graddiff and npo: of AdamW; try several, a small model may need 1e-3.  "
    "[default: 1e-4]",
)
@click.option("--with-duplicates", is_flag=True, help="Show near-duplicates and forget them too.")
@click.option(
    "--again",
    is_flag=True,
    help="Undo once more what this checkpoint has already forgotten. Such samples are left out "
    "otherwise, because undoing the same steps twice goes too far.",
)
@click.option("--dry-run", is_flag=True, help="Measure and show, write nothing.")
@output_options
def forget(
    ids: tuple[str, ...],
    store_path: Path,
    model: Path,
    out: Path,
    direction: str | None,
    dose: str | None,
    weights: str | None,
    epochs: str | None,
    from_checkpoints: tuple[Path, ...],
    layers: tuple[str, ...],
    max_holdout_increase: float,
    max_retained_increase: float | None,
    max_neighbour_increase: float | None,
    run: str | None,
    seed: int,
    exact: bool,
    iterate: int | None,
    retained: Path | None,
    steps: int | None,
    learning_rate: float | None,
    with_duplicates: bool,
    again: bool,
    dry_run: bool,
    output: str,
) -> None:
    """Make a model forget samples: write a new checkpoint, record the scores.

    IDS are the samples' ids, or beginnings of ids that only one sample has. Exit code 3 says that
    the limit on held-out damage or too small a dose left it short, or that nothing was written.

    \b
    Examples:
      gradstore forget p-0007 -s store --model trained --out forgotten
      gradstore forget p-0007 p-0031 -s store --model trained --out forgotten --dry-run
      gradstore forget p-0048 -s store --model trained --out forgotten --with-duplicates
      gradstore forget p-0048 -s store --model trained --out retrained --exact
      gradstore forget p-0048 -s store --model trained --out ascended --direction npo \\
          --retained people.jsonl
    """
    source = click.get_current_context().get_parameter_source("max_holdout_increase")
    limited_by_hand = source is not ParameterSource.DEFAULT
    by_direction = any((
        direction, dose, weights, epochs, from_checkpoints, layers, iterate, again,
        retained, steps, learning_rate,
    ))  # fmt: skip
    of_others = (max_retained_increase, max_neighbour_increase)
    limited = limited_by_hand or of_others != (None, None)
    if exact and (by_direction or limited):
        raise click.UsageError(
            "--exact trains from the start: it has no --direction, --dose, --weights, --layers, "
            "--epochs, --from-checkpoints, --iterate, --retained, --steps, --learning-rate, "
            "--again or limits"
        )
    from gradstore.store import Store

    store = Store.open(store_path)
    store.resolve(ids)  # an unknown id is told before torch is loaded

    hush()

    from gradstore.unlearn.forget import ForgetSettings
    from gradstore.unlearn.forget import forget as carry_out

    settings = ForgetSettings(
        direction=direction,
        dose=dose,
        weights=weights,
        epochs=epochs,
        layers=layers or None,
        from_checkpoints=from_checkpoints,
        max_holdout_increase=max_holdout_increase,
        max_retained_increase=max_retained_increase,
        max_neighbour_increase=max_neighbour_increase,
        run=run,
        seed=seed,
        with_duplicates=with_duplicates,
        again=again,
        iterate=iterate,
        retained=retained,
        steps=steps,
        learning_rate=learning_rate,
    )
    if exact:
        from gradstore.unlearn.exact import forget_exactly

        with progress_bar("training again") as bar:
            outcome = forget_exactly(
                store, ids, model, out, settings, dry_run=dry_run, progress=say, steps=bar
            )
    else:
        outcome = carry_out(store, ids, model, out, settings, dry_run=dry_run, progress=say)
    for note in outcome.notes:
        say(f"note: {note}")
    roles = ("forget", "neighbour", "retained", "holdout")
    of_role = {role: [s for s in outcome.scores if s.role == role] for role in roles}
    scores = [
        {
            "samples": role,
            "count": len(of),
            "loss_before": sum(s.before for s in of) / len(of),
            "loss_after": sum(s.after for s in of) / len(of),
            "worst_rise": max(s.after - s.before for s in of),
            "worst_rise_foretold": max(
                (s.forecast - s.before for s in of if s.forecast is not None), default=None
            ),
        }
        for role, of in of_role.items()
        if of
    ]
    path = [
        {
            "dose": p.dose,
            "forget": p.forget,
            "foretold": p.forecast,
            "retained": p.retained,
            "holdout": p.holdout,
            "worst_rise": p.worst,
            "chosen": "<--" if p.dose == outcome.dose else "",
        }
        for p in outcome.path
    ]
    each = [
        {
            "id": s.id,
            "loss_before": s.before,
            "loss_after": s.after,
            "target": s.target,
            "low": s.low,
            "high": s.high,
            "way": s.way,
            "outcome": s.outcome,
        }
        for s in of_role["forget"]
    ]
    target = outcome.target
    request = {
        "request_id": outcome.request_id,
        "verdict": outcome.verdict,
        "dose": outcome.dose,
        "target": None if target is None else target.loss,
        "target_low": None if target is None else target.low,
        "target_high": None if target is None else target.high,
        "target_source": None if target is None else target.source,
        "run": outcome.run,
        "out": outcome.out,
    }
    sections: dict[str, list[dict[str, Any]]] = {
        "path": path,
        "scores": scores,
        "forgotten": each,
        "request": [request],
    }
    emit_sections(sections, output, main="forgotten")
    say(f"{outcome.verdict}: {outcome.reason}")
    if dry_run:
        say("dry run: nothing was written")
    elif outcome.out is not None:
        say(f"wrote {outcome.out}; request {outcome.request_id} is in the catalog")
    if outcome.verdict != "forgotten":
        raise SystemExit(FAILED_CHECK)
