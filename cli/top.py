"""``gradstore top``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import bytes_option, output_options, parsed, store_option
from .output import emit, emit_sections, hush, say

if TYPE_CHECKING:
    from gradstore.influence.query import Checkpoint, Query
    from gradstore.influence.top import Scores, Settings
    from gradstore.store import Store
    from gradstore.store.record import LinearLayer

_REPLACED = ("hvp", "newton", "activation")  # methods that put something in the gradient's place


def _schedule(text: str) -> None:
    from gradstore.capture.schedule import Schedule

    Schedule.parse(text)


def _executor(text: str) -> None:
    from gradstore.influence.executors import parse_executor

    parse_executor(text)


@click.command()
@store_option
@click.option("--id", help="Ask what shaped the model's hold on this sample.")
@click.option("--text", help="Ask about the loss on a text.")
@click.option("--prompt", help="Ask about what follows it: --completion, or what --model says.")
@click.option("--completion", help="Ask about the loss on this alone, after --prompt.")
@click.option(
    "--new-tokens",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Most tokens that the model says after --prompt.",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Checkpoint to take the query's gradient at.  [default: stored gradients with --id "
    "and dot or cosine, else the one the run wrote]",
)
@click.option(
    "--method",
    type=click.Choice(["dot", "cosine", "self", "hvp", "newton", "activation", "activation-dot"]),
    default="dot",
    show_default=True,
    help="Steps times gradients (TracIn), the angle alone, each record on itself (no query); steps "
    "times the query bent by curvature, the model's (hvp) or that of stored gradients (newton), or "
    "times its activations.",
)
@click.option(
    "--curvature",
    type=click.Choice(["gauss-newton", "hessian"]),
    help="With hvp: the matrix that bends the query.  [default: gauss-newton]",
)
@click.option(
    "--solver",
    type=click.Choice(["cg", "lissa"]),
    help="With hvp: conjugate gradients, or LiSSA.  [default: cg]",
)
@click.option(
    "--damping",
    type=click.FloatRange(min=0, min_open=True),
    help="With hvp: λ, added to the matrix.  [default: a tenth of the curvature along the query]",
)
@click.option(
    "--layers",
    multiple=True,
    help="With hvp: linear layers that the run captured, solved for and scored together with the "
    "embedding: names or patterns, repeated or with commas; blocks for all, ! before what is left "
    "out.",
)
@click.option("--adam", is_flag=True, help="With dot: steps as Adam took them, by its moments.")
@click.option(
    "-k", "count", type=click.IntRange(min=1), default=10, show_default=True, help="Rows."
)
@click.option("--bottom", is_flag=True, help="The lowest scores instead of the highest.")
@click.option(
    "--epochs",
    callback=parsed(_schedule),
    default="all",
    show_default=True,
    help="Stored epochs to sum over: first, all, every:N, or a list such as 1,3-5.",
)
@click.option(
    "--side",
    type=click.Choice(["both", "input"]),
    default="both",
    show_default=True,
    help="Of a tied embedding: input leaves the head's side out and is faster.",
)
@click.option("--tokens", is_flag=True, help="Show which of a record's tokens make its score.")
@click.option("--with-self", is_flag=True, help="Keep the sample of --id among the records.")
@click.option("--run", help="Run whose gradients to score.  [default: the newest]")
@bytes_option("--memory", "512MB", "Most to hold while reading.")
@click.option(
    "--coarse",
    type=click.IntRange(min=0),
    help="Read only so many records, those that sketches (`gradstore sketch`) put highest; 0 reads "
    "all.  [default: 1000, of more than 20000 that have sketches]",
)
@click.option(
    "--executor",
    callback=parsed(_executor),
    default="here",
    show_default=True,
    help="Where segments are read: here, dask, or dask:ADDRESS of a scheduler.",
)
@click.option(
    "--precision",
    type=click.Choice(["bfloat16", "float32"]),
    help="Of the products: three digits of |g| |q|, or six at some twice the time.  [default: "
    "bfloat16 where records are stored so and the device multiplies it]",
)
@click.option(
    "--device",
    help="Where products are made, and the query's gradient: cpu, cuda, cuda:1, …  [default: cuda "
    "where there is one and segments are read here]",
)
@click.option("--dry-run", is_flag=True, help="Show, write nothing.")
@output_options
def top(
    store_path: Path,
    id: str | None,
    text: str | None,
    prompt: str | None,
    completion: str | None,
    new_tokens: int,
    model: Path | None,
    method: str,
    curvature: str | None,
    solver: str | None,
    damping: float | None,
    layers: tuple[str, ...],
    adam: bool,
    count: int,
    bottom: bool,
    epochs: str,
    side: str,
    tokens: bool,
    with_self: bool,
    run: str | None,
    memory: int,
    coarse: int | None,
    executor: str,
    precision: str | None,
    device: str | None,
    dry_run: bool,
    output: str,
) -> None:
    """Find the records that shaped an output: those whose training moved it most.

    A score by dot says how many nats of the query's loss (summed over its tokens) the record's
    training steps took off, to first order: positive helped, negative (--bottom) worked against it.
    Scores are kept in the catalog (view influential). By self, the norms of gradients are shown
    too, each record's mean: what is odd (a wrong label, a secret) comes out on top.

    \b
    Examples:
      gradstore top --id p-0048 -s store
      gradstore top --prompt "Ada Moss lives in" --completion " Leeds" -s store --adam --tokens
      gradstore top --prompt "Ada Moss lives in" -s store --model trained
      gradstore top --id p-0048 -s store --method newton
      gradstore top --method self -s store -k 20
    """
    if method == "activation-dot":
        method = "activation"
    asks = (("--id", id), ("--text", text), ("--prompt", prompt))
    asked = [name for name, given in asks if given is not None]
    if len(asked) != (method != "self"):
        what = "no query" if method == "self" else "one of --id, --text or --prompt"
        raise click.UsageError(
            f"--method {method} takes {what}; given: {' '.join(asked) or 'none'}"
        )
    if completion is not None and prompt is None:
        raise click.UsageError("--completion comes after a --prompt; without one give --text")
    if completion == "":
        raise click.UsageError("--completion is empty: leave it out to ask what the model says")
    if method == "activation" and prompt is not None:
        raise click.UsageError("--method activation is of a whole text: give --id or --text")
    if method in _REPLACED and side == "input":
        raise click.UsageError(f"--method {method} is of both sides: leave --side input out")
    if tokens and method in ("cosine", "self"):
        raise click.UsageError(f"--method {method} is no sum over --tokens; give another")
    if adam and method != "dot":
        raise click.UsageError("--adam belongs to --method dot")
    bending = {"curvature": curvature, "solver": solver, "damping": damping}
    bending = {name: value for name, value in bending.items() if value is not None}
    if bending and method != "hvp":
        raise click.UsageError(f"--{next(iter(bending))} belongs to --method hvp")
    if layers and (method != "hvp" or tokens):
        raise click.UsageError("--layers belong to --method hvp, without --tokens")
    if coarse and (adam or bottom or method not in ("dot", "cosine") or side == "input"):
        raise click.UsageError(
            "--coarse finds the highest by dot or cosine of whole gradients: leave --adam, "
            "--bottom and --side input out"
        )
    if coarse and coarse <= count:
        raise click.UsageError(f"--coarse {coarse} leaves nothing to choose {count} rows (-k) from")

    from gradstore.store import Store

    store = Store.open(store_path)
    facts = store.run(run)
    # here, so that an unknown id is told before torch is loaded
    known = {} if id is None else store.resolve([id])

    hush()

    from gradstore.influence.device import device_of, room_on
    from gradstore.influence.executors import executor_of
    from gradstore.influence.query import Checkpoint, of_sample
    from gradstore.influence.questions import record_scores
    from gradstore.influence.top import Settings, influences
    from gradstore.influence.top import tokens_of as parts_of

    place = device_of(device or (None if executor == "here" else "cpu"))
    sides: Any = "input" if side == "input" else None
    checkpoint = None
    if asked and (model is not None or id is None or method in _REPLACED):
        path = model or facts["checkpoint"]
        if path is None:
            raise click.UsageError(f"{facts['name']} wrote no checkpoint: name one with --model")
        checkpoint = Checkpoint(store, Path(path), place)
    linear = _linear(store, facts, layers)
    queries: list[Query] = []
    if checkpoint is None and id is not None:
        queries = [of_sample(store, facts, id, sides)]
    elif checkpoint is not None and prompt is not None and completion is not None:
        queries = [checkpoint.of_completion(prompt, completion, sides, linear)]
    elif checkpoint is not None and prompt is not None:
        query, said = checkpoint.of_output(prompt, new_tokens, sides, linear)
        say(f"the model goes on: {said}")
        queries = [query]
    elif checkpoint is not None:
        kind = "tokens" if text is None else "text"
        whole = _read(store, facts, known) if text is None else checkpoint.tokens(text)
        if method == "activation":
            queries = [checkpoint.of_activations(whole, kind)]
        else:
            queries = [checkpoint.of_tokens(whole, 1, sides, kind, linear)]
        for full in known:  # by its id, which an erasure looks for
            queries = [replace(query, name=f"id:{full}", sample=full) for query in queries]
    if checkpoint is not None and method in ("hvp", "newton"):
        with room_on(place):
            queries = [_bent(store, facts, query, checkpoint, method, bending) for query in queries]
    if checkpoint is not None and store.model.tied and (facts["sides"], side) == ("input", "both"):
        say(
            f"{facts['name']} stored the input side alone, half of a tied embedding's gradient; "
            "the query's is whole"
            + ("" if method in _REPLACED else ". --side input compares like with like")
        )
    settings = Settings(method, adam, epochs, sides, coarse or None, precision, place)  # type: ignore[arg-type]
    if coarse is None and not bottom:
        settings = replace(settings, coarse=_automatic(store, facts, settings))
    with room_on(place), executor_of(executor) as over:
        [scores] = influences(store, queries, settings, run=run, memory=memory, executor=over)
    if precision is None and scores.settings.precision != store.format.dtype:
        say(
            "products are in float32, more slowly: "
            f"{'this processor' if place == 'cpu' else place} does not multiply "
            f"{store.format.dtype} itself"
        )
    if settings.coarse is not None:
        say(f"two stages: of all records {len(scores.values)} were scored exactly, those that "
            "sketches put highest")  # fmt: skip
    if not with_self:
        scores = scores.without(known.values())
    answers = list(enumerate(zip(scores.sample_ids, scores.values, strict=True), 1))
    shown = answers[::-1][:count] if bottom else answers[:count]
    numbers = [sample for _, (sample, _) in shown]
    names = dict(
        store.rows("SELECT sample_id, id FROM samples WHERE list_contains(?, sample_id)", [numbers])
    )
    rows = [{"rank": rank, "id": names[sample], "score": score} for rank, (sample, score) in shown]
    columns = ["rank", "id", "score"]
    if scores.norms is not None:
        columns.append("norm")
        rows = [{**row, "norm": scores.norms[int(row["rank"]) - 1]} for row in rows]
    if tokens:
        of = parts_of(store, scores, numbers, memory=memory)
        parts = [
            {"id": names[sample], **row}
            for sample in numbers
            for row in _parts(store, scores, sample, of[sample])
        ]
        emit_sections({"influences": rows, "tokens": parts}, output, main="tokens")
    else:
        emit(rows, output, columns)
    if not dry_run:
        number = record_scores(store, scores, numbers)
        say(f"question {number} is in the catalog (view influential)")


def _read(store: Store, run: dict[str, Any], known: dict[str, int]) -> Any:
    """The token ids of the sample that is asked about, as the run met it or held it out."""
    from gradstore.errors import InfluenceError

    [(id, number)] = known.items()
    found = store.tokens([number], run["run_id"])
    if number not in found:
        raise InfluenceError(f"{id!r} is not among the samples of {run['name']}; give its --text")
    return found[number]


def _linear(store: Store, run: dict[str, Any], patterns: tuple[str, ...]) -> list[LinearLayer]:
    """The captured linear layers that patterns name; none where there are no patterns."""
    if not patterns:
        return []
    from gradstore.errors import SettingsError
    from gradstore.unlearn.exposures import layers_of

    named = layers_of(store, run, patterns)
    known = {layer.layer: layer for layer in store.layers(run["run_id"])}
    if others := [name for name in named if name not in known]:
        raise SettingsError(
            f"--layers {others[0]} is no linear layer: the embedding is always among them, and "
            "position and head cannot be; `--layers blocks` names all that can"
        )
    return [known[name] for name in named]


def _bent(
    store: Store,
    run: dict[str, Any],
    query: Query,
    checkpoint: Checkpoint,
    method: str,
    bending: dict[str, Any],
) -> Query:
    """The query solved for; says how firm the curvature was made, and what was left unsolved."""
    from gradstore.influence.solved import by_fisher, by_products

    if method == "newton":
        solved = by_fisher(store, run, query)
    else:
        solved = by_products(store, run, query, checkpoint.network, **bending)
    assert solved.bent is not None
    said = f"λ {solved.bent.damping:.3g}"
    if method == "hvp":
        by = "LiSSA" if solved.bent.solver == "lissa" else "conjugate gradients"
        said += f"; {by} left {100 * solved.bent.residual:.2g} % of the query"
    say(said)
    return solved


def _automatic(store: Store, run: dict[str, Any], settings: Settings) -> int | None:
    """How many records to score exactly where none were asked for; None for all."""
    from gradstore.errors import InfluenceError
    from gradstore.influence.sketches import worthwhile

    if settings.adam or settings.method not in ("dot", "cosine") or settings.sides is not None:
        return None
    try:
        return worthwhile(store, run)
    except InfluenceError as error:
        say(f"all records are read: {error}")
        return None


def _parts(store: Store, scores: Scores, sample: int, parts: Any) -> list[dict[str, Any]]:
    """Rows of ``--tokens``: what was read, what was to be predicted from it, and their parts."""
    from gradstore.errors import ModelError
    from gradstore.training.model import load_tokenizer

    try:
        tokenizer = load_tokenizer(scores.run["checkpoint"])
    except ModelError:  # the run's model is gone: numbers remain
        tokenizer = None
    ids = store.tokens([sample], scores.run["run_id"])[sample].tolist()
    written = [str(i) if tokenizer is None else repr(tokenizer.decode([i])) for i in ids]
    return [
        {
            "position": at,
            "read": written[at],
            "input": read,
            "next": written[at + 1],
            "output": made,
            "score": read + made,
        }
        for at, (read, made) in enumerate(parts.tolist())
    ]
