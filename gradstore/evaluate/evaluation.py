"""An evaluation: a checkpoint after forgetting, the one before, and one that never saw it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gradstore.errors import EvaluateError
from gradstore.evaluate import attacks as attempts
from gradstore.evaluate import check as checks
from gradstore.evaluate import general, metrics
from gradstore.evaluate.attacks import ROUNDINGS, On, RelearnSettings, relearn_each, rounded
from gradstore.evaluate.audience import Audience
from gradstore.evaluate.check import Check
from gradstore.evaluate.continuation import continuations, rouge_l_recall
from gradstore.evaluate.divergence import FEW, divergences, excess
from gradstore.evaluate.exposure import CANDIDATES, Lineup, exposures, lineup
from gradstore.evaluate.extraction import Secret, asked_of, extractions
from gradstore.evaluate.figures import NAMES, Figure, Measured, Values, figures
from gradstore.evaluate.membership import above_reference, gradnorms_of
from gradstore.evaluate.neighbours import with_exposed
from gradstore.evaluate.population import compared, margins
from gradstore.evaluate.record import record
from gradstore.identity import digest_checkpoint, identify
from gradstore.store import catalog
from gradstore.store.lineage import forgotten_before, named, run_of
from gradstore.store.store import Store
from gradstore.training.model import load_model, tokenizer_of

PAIRS = (("reference", "original"), ("reference", "model"), ("original", "model"))


@dataclass(frozen=True)
class EvaluateSettings:
    """How to evaluate; the names are those of ``gradstore eval``'s options.

    ``attacks`` are of relearn, quantize, extract and exposure; ``secrets`` what the last two ask
    for, by sample id; exposure ranks each among ``candidates`` strings. ``relearn_on`` and
    ``relearn_lr`` are those of :class:`RelearnSettings`; None is a fortieth of the learning rate
    that the run peaked at (:data:`~gradstore.evaluate.attacks.GENTLE`). ``general`` is a text file
    to measure perplexity on.
    """

    attacks: tuple[str, ...] = ()
    secrets: Mapping[str, Secret] | None = None
    relearn_steps: int = 10
    relearn_lr: float | None = None
    run: str | None = None
    seed: int = 0
    relearn_on: On = 0.5
    general: Path | None = None
    candidates: int = CANDIDATES


@dataclass(frozen=True)
class Evaluation:
    """What was found, and what it means in words; without a reference there are no checks."""

    evaluation_id: int | None
    figures: list[Figure]
    curves: Mapping[str, list[list[float]]]
    checks: list[Check]
    said: list[str]

    @property
    def failed(self) -> list[str]:
        """The checks that failed."""
        return [check.check for check in self.checks if check.passed is False]


def evaluate(
    store: Store,
    given: Sequence[str],
    model: Path,
    original: Path | None = None,
    reference: Path | None = None,
    settings: EvaluateSettings | None = None,
    *,
    more: Mapping[str, Sequence[Path]] | None = None,
    dry_run: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Evaluate ``model`` on what it forgot, its neighbours, others that stay, and held-out ones.

    ``given`` as in :func:`named`; ``original`` is the checkpoint before, ``reference`` one that
    never saw the forgotten, and ``more`` are further ones of each, by those names, trained with
    other seeds (:func:`~gradstore.evaluate.population.compared`). Results go into the catalog
    (tables ``evaluations`` and ``measurements``), unless ``dry_run``. Raises :class:`IdError`,
    :class:`ModelError` or :class:`EvaluateError`.
    """
    settings = settings or EvaluateSettings()
    samples, request = named(store, given)
    folders = {
        name: folder
        for name, folder in zip(NAMES, (original, model, reference), strict=True)
        if folder is not None
    }
    networks = {name: load_model(folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        store.model.check(identify(networks[name], tokenizer_of(folder)), str(folder))
    digests = {name: _digest(folder) for name, folder in folders.items()}
    others = _others(more or {}, digests)
    run, said = run_of(store, digests["model"], settings.run)
    audience = _audience(store, run, samples, digests["model"], settings.seed)
    tokenizer = next((t for f in folders.values() if (t := tokenizer_of(f)) is not None), None)
    options = _relearning(settings, run) if "relearn" in settings.attacks else None
    questions = _questions(settings, networks["model"], tokenizer, audience)
    curves = {}
    if options is not None:  # first, as it may not be possible
        forgotten, held_out = (audience.only(role).tokens for role in ("forget", "holdout"))
        taught = relearn_each(networks, forgotten, held_out, options, progress)
        curves = {name: [each.rest for each in of] for name, of in taught.items()}
        said += attempts.said(taught, options)
    measured = _measure(networks, tokenizer, audience, settings.attacks, questions, progress)
    measured = replace(measured, curves=curves)
    if more:
        told, lines = _told(store, networks, more, audience, progress)
        measured = replace(
            measured, values={name: {**of, **told[name]} for name, of in measured.values.items()}
        )
        said += lines
    found = figures(measured)
    judged = _judge(measured) if reference else []
    said += _words(measured)
    number = None
    if not dry_run:
        facts = {
            "request_id": request,
            "run_id": run["run_id"],
            "passed": not any(c.passed is False for c in judged) if reference else None,
            "settings": catalog.as_json(
                {
                    "seed": settings.seed,
                    "attacks": settings.attacks,
                    "candidates": settings.candidates,
                    "general": settings.general and general.digest_of(settings.general),
                    "relearn": options and asdict(options),
                    "more": others,
                    "checks": [asdict(each) for each in judged],
                    "said": said,
                }
            ),
        }
        for name, folder in folders.items():
            path = folder.resolve() if folder.is_dir() else folder
            facts |= {name: str(path), f"{name}_digest": digests[name]}
        number = record(store, facts, measured, found)
    return Evaluation(number, found, measured.curves, judged, said)


def _audience(
    store: Store, run: dict[str, Any], samples: dict[str, int], digest: str, seed: int
) -> Audience:
    known = store.tokens(list(samples.values()), run["run_id"])
    if unknown := [i for i, number in samples.items() if number not in known]:
        raise EvaluateError(
            f"{run['name']} did not meet {unknown[0]!r}; `gradstore show {unknown[0]}` names the "
            "runs that did, choose one with --run"
        )
    gone = [i for i in forgotten_before(store, digest) if i not in samples]
    return with_exposed(Audience.choose(store, run, samples, seed, gone), store, run, seed)


def _others(more: Mapping[str, Sequence[Path]], digests: Mapping[str, str]) -> dict[str, list[str]]:
    """The digests of further checkpoints; refuses one that is given twice, as no other seed's."""
    found = {}
    for name, folders in more.items():
        found[name] = [_digest(folder) for folder in folders]
        if len({digests[name], *found[name]}) <= len(folders):
            raise EvaluateError(
                f"two of the {name}s have the same weights: give each checkpoint once, and those "
                "that were trained with other seeds"
            )
    return found


# -- what is measured ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Questions:
    """What every model is asked, beside the records: secrets by place, and windows of a text."""

    secrets: Mapping[int, Secret]
    lineups: Mapping[int, Lineup]
    windows: Sequence[Tensor]


def _questions(
    settings: EvaluateSettings, model: Any, tokenizer: Any, audience: Audience
) -> _Questions:
    """Refuses what cannot be asked, before anything takes long."""
    secrets, lineups, windows = dict[int, Secret](), dict[int, Lineup](), list[Tensor]()
    if {"extract", "exposure"} & {*settings.attacks}:
        secrets = asked_of(model, tokenizer, audience, settings.secrets or {})
    if "exposure" in settings.attacks:
        drawn = settings.candidates, settings.seed
        for at in secrets.keys() & {*audience.of("forget")}:
            lineups[at] = lineup(model, tokenizer, secrets[at], *drawn)
    if settings.general is not None:
        windows = general.windows(settings.general, tokenizer, model)
    return _Questions(secrets, lineups, windows)


def _measure(
    networks: dict[str, Any],
    tokenizer: Any,
    audience: Audience,
    attacks: Sequence[str],
    questions: _Questions,
    progress: Callable[[str], None],
) -> Measured:
    tokens, count = audience.tokens, len(audience.members)
    read = general.read(networks, questions.windows) if questions.windows else {}
    values: dict[str, Values] = {}
    for name, network in networks.items():
        progress(f"measuring the {name}")
        values[name] = _values(network, tokenizer, tokens)
        values[name]["gradnorm"] = gradnorms_of(network, audience)
        if "extract" in attacks:
            values[name] |= extractions(network, tokenizer, questions.secrets, count)
        if "exposure" in attacks:
            values[name]["exposure"] = exposures(network, questions.lineups, count)
    if "reference" in values:
        for name in values.keys() - {"reference"}:
            known = above_reference(values[name]["loss"], values["reference"]["loss"])
            values[name]["loss_above_reference"] = known
    apart = {
        (one, other): divergences(networks[one], networks[other], tokens)
        for one, other in PAIRS
        if one in networks and other in networks
    }
    for rounding in ROUNDINGS if "quantize" in attacks else ():
        progress(f"rounding to {rounding}")
        coarse = rounded(networks["model"], rounding)
        rows = [metrics.figures(of) for of in metrics.predictions(coarse, tokens)]
        for metric in ("loss", "exact_memorization"):
            values["model"][f"{metric}_{rounding}"] = np.array([row[metric] for row in rows])
        if "reference" in networks:
            apart["reference", rounding] = divergences(networks["reference"], coarse, tokens)
    return Measured(audience, values, apart, general=read)


def _relearning(settings: EvaluateSettings, run: Mapping[str, Any]) -> RelearnSettings:
    """Raises :class:`EvaluateError` where neither the settings nor the run know a rate."""
    peak = json.loads(run["settings"] or "{}").get("learning_rate")
    rate = settings.relearn_lr or (peak and peak * attempts.GENTLE)
    if not rate:
        raise EvaluateError("the run's learning rate is not known: give --relearn-lr")
    return RelearnSettings(settings.relearn_steps, rate, settings.relearn_on)


def _told(
    store: Store,
    networks: Mapping[str, Any],
    more: Mapping[str, Sequence[Path]],
    audience: Audience,
    progress: Callable[[str], None],
) -> tuple[dict[str, Values], list[str]]:
    """What many models tell; those of ``more`` are in memory one at a time."""
    found = {name: [margins(network, audience.tokens)] for name, network in networks.items()}
    for name, folders in more.items():
        for folder in folders:
            progress(f"measuring {folder}, one more {name}")
            network = load_model(folder)
            store.model.check(identify(network, tokenizer_of(folder)), str(folder))
            found[name].append(margins(network, audience.tokens))
    rows = {name: np.array(of) for name, of in found.items()}
    return compared(rows, audience.of("forget"))


def _values(network: Any, tokenizer: Any, tokens: Sequence[Tensor]) -> Values:
    each = metrics.predictions(network, tokens)
    rows = [metrics.figures(of) for of in each]
    values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    if tokenizer is None:
        return values
    texts = [tokenizer.decode(sample) for sample in tokens]
    pairs = zip(each, texts, strict=True)
    values["zlib_ratio"] = np.array([metrics.zlib_ratio(of, text) for of, text in pairs])
    said = continuations(network, tokens)
    values["rouge_l_recall"] = np.array(
        [
            rouge_l_recall(tokenizer.decode(new), tokenizer.decode(sample[-len(new) :]))
            for new, sample in zip(said, tokens, strict=True)
        ]
    )
    return values


# -- what follows from it ------------------------------------------------------------------------


def _judge(measured: Measured) -> list[Check]:
    losses = [
        measured.of(n, role) for n in ("model", "reference") for role in ("forget", "holdout")
    ]
    found = [checks.membership(*losses)]
    if "original" in measured.values:
        found.append(
            checks.nearer(
                measured.divergence("reference", "model", "forget"),
                measured.divergence("original", "model", "forget"),
            )
        )
    if measured.curves:
        found.append(checks.relearning(measured.curves["model"], measured.curves["reference"]))
    if "original" in measured.values and ("reference", ROUNDINGS[0]) in measured.apart:
        found.append(checks.rounding(_states(measured)))
    if "extracted" in measured.values["model"]:
        said = (
            np.maximum(*(measured.of(name, "forget", f"extracted{how}") for how in ("", "_beam")))
            for name in ("model", "reference")
        )
        found.append(checks.extraction(*said))
    return found


def _states(measured: Measured) -> dict[str, checks.Standing]:
    """Where the model stands as it is, and after each rounding."""
    before, target = (
        float(measured.of(name, "forget").mean()) for name in ("original", "reference")
    )
    nothing = measured.divergence("reference", "original", "forget")
    states = {}
    for said, metric, other in [
        ("as it is", "loss", "model"),
        *((rounding, f"loss_{rounding}", rounding) for rounding in ROUNDINGS),
    ]:
        now = float(measured.of("model", "forget", metric).mean())
        here = measured.divergence("reference", other, "forget")
        states[said] = checks.standing(before, now, target, here, nothing)
    return states


def _words(measured: Measured) -> list[str]:
    said = []
    count, outside = (len(measured.audience.of(role)) for role in ("forget", "holdout"))
    if "reference" not in measured.values:
        said.append(
            "Without a reference these figures say what changed, and whether the record still "
            "looks like a member; not whether the model is like one that never saw it. A loss far "
            "above that of held-out records reveals it too. `gradstore forget --exact` trains a "
            "reference."
        )
    elif "original" not in measured.values:
        said.append(
            "Without the original it stays open how much there was to forget: a model that never "
            "learned the record passes as well. Give --original."
        )
    elif outside:
        gap = excess(
            measured.divergence("reference", "original", "forget"),
            measured.divergence("reference", "original", "holdout"),
        )
        if gap.low <= 0:
            said.append(
                f"Original and reference hardly differ on these records ({gap.value:+.4f} nats "
                f"per token more than on held-out ones, {gap.low:+.4f} to {gap.high:+.4f}): "
                "nothing was there to forget, and what passes here proves little."
            )
    if not outside:
        said.append(
            "The store has no held-out samples, so membership cannot be judged: `gradstore ingest "
            "--holdout` keeps some."
        )
    if "exposure" in measured.values["model"]:
        said.append(
            "Exposure counts what a secret shares with other records, such as an area code, as "
            "known too: only what exceeds the reference's says that this record was learned. It "
            "is at most log2 of --candidates, however well a model knows the secret."
        )
    if count < FEW:
        said.append(
            f"Intervals of {count} forgotten record{'s' * (count > 1)} say how much tokens and "
            "held-out records vary, not what another record or another training seed would give; "
            "a Kolmogorov-Smirnov test of so few can hardly fail."
        )
    said.append("A passed check is evidence on these records, against these attacks: no guarantee.")
    return said


def _digest(folder: Path) -> str:
    return digest_checkpoint(folder) if folder.is_dir() else str(folder)
