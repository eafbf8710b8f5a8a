"""What each claim is judged by, and the sentence that follows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
from influence import spearman

from claims.results import BLOCK, FIXED, OURS, PAPER, Results, Row
from claims.verdicts import Finding, exactly, interval, median, ratio, sentence

DOSES = {"R_f": "matched", "equal R_f": "equal norm"}
RANDOM, FORECAST = "random", "slope along the update"  # no scores of the paper's
SLIGHT = 0.05  # of the way to the retrained model's loss: nothing
EARLY = 0.9  # of it: before its end
BEYOND = 1.1  # of it: over-exposed
METHODS = {
    "raw, first epoch (the paper)": PAPER,
    "applied": OURS,
    "newton": OURS | {"kind": "newton", "epochs": None},
    "fresh ascent": OURS | {"kind": "fresh", "epochs": None},
    "random direction": OURS | {"kind": "random", "epochs": None},
    "another record's gradient": OURS | {"kind": "other id", "epochs": None},
}
CONTROLS = list(METHODS)[-2:]


def by_controls(results: Results) -> Iterator[Finding]:
    """Of the paper's direction against doing nothing, and what knows nothing of the record."""
    for text in results.tied:
        paper = [(value, 1.0) for value in results.of(text, PAPER, "R_f").values()]
        yield Finding(f"{text}, matched: R_f of the paper's ascent", ratio(paper), 1.0, -1)
        for name in CONTROLS:
            for column, dose in DOSES.items():
                figure = results.ratio_of(text, PAPER, [METHODS[name]], column)
                yield Finding(f"{text}, {dose}: own gradient ÷ {name}", figure, 1.0, -1)


def by_epochs(results: Results) -> Iterator[Finding]:
    """Of the first epoch against later ones."""
    for text in results.tied:
        for kind in ("raw", "applied"):
            ways = [way for way in results.epochs.values() if way["kind"] == kind]
            first, later, last, every = ways[0], ways[1:-1], ways[-2:-1], ways[-1:]
            for name, others in (("later", later), ("last", last), ("all", every)):
                for column, dose in DOSES.items():
                    figure = results.ratio_of(text, first, others, column)
                    yield Finding(f"{text}, {kind}, {dose}: first ÷ {name}", figure, 1.0, -1)


def by_layers(results: Results) -> Iterator[Finding]:
    """Of the embedding against other layers."""
    for text in results.texts:
        for kind, base in (("raw", PAPER), ("applied", OURS)):
            places = {way["where"] for way in results.layers(text).values()} - {"embedding"}
            against = {
                "blocks, one by one": [place for place in places if re.fullmatch(BLOCK, place)],
                "last two blocks": results.last_blocks(text),
                "lm_head": ["head"],
                "whole model": ["all"],
            }
            for name, where in against.items():
                others = [base | {"where": place} for place in where if place in places]
                for column, dose in DOSES.items() if others else ():
                    figure = results.ratio_of(text, base, others, column)
                    about = f"{text}, {kind}, {dose}: embedding ÷ {name}"
                    yield Finding(about, figure, 1.0, -1)


def by_last_blocks(results: Results) -> Iterator[Finding]:
    """How far the last two blocks go."""
    for text in results.texts:
        for last in results.last_blocks(text):
            moved = median([*results.way(text, PAPER | {"where": last}, "equal loss").values()])
            about = f"{text}, raw, equal norm: way that the last two blocks go"
            yield Finding(about, moved, SLIGHT, -1)


def by_bytes(results: Results) -> Iterator[Finding]:
    """What the embedding's gradients take of all."""
    for text, size in results.sizes.items():
        share = exactly(share_of(size["bytes"]))
        yield Finding(f"{text}: stored embedding ÷ everything", share, 0.5, -1)


def by_rises(results: Results) -> Iterator[Finding]:
    """Of scores with the loss rises of those that stay."""
    for (text, kind, method), of in results.scored.items():
        if method not in (RANDOM, FORECAST):
            random = {(row["seed"], row["id"]): row for row in results.scored[text, kind, RANDOM]}
            more = [row["rho"] - random[row["seed"], row["id"]]["rho"] for row in of]
            about = f"{text}, {method}: ρ with whom {kind} hits, less the random score's"
            yield Finding(about, interval(np.mean, more), 0.0, 1)


def by_success(results: Results) -> Iterator[Finding]:
    """Of a record's score for itself with its own R_f."""
    for (text, kind, method), of in results.scored.items():
        if method not in (RANDOM, FORECAST):
            pairs = [(row["own"], row["R_f"]) for row in of]
            size = interval(lambda x: abs(spearman(x[:, 0], x[:, 1])), pairs)
            about = f"{text}, {method}: |ρ| with R_f of {kind}, {by_chance(len(of)):.2f} by chance"
            yield Finding(about, size, by_chance(len(of)), 1)


def by_nearness(results: Results) -> Iterator[Finding]:
    """Where ascent stopped by a loss ends against one dose for all."""
    for text, kind, stops in results.paths():
        for name in ("estimated loss", "retrained loss"):
            pairs = [(a[0], b[0]) for a, b in zip(stops[name], stops[FIXED], strict=True)]
            about = f"{text}, {kind}: R_f at {name} ÷ uncalibrated"
            yield Finding(about, ratio(pairs), 1.0, -1)


def by_exposure(results: Results) -> Iterator[Finding]:
    """How often one dose for all goes too far."""
    for text, kind, stops in results.paths():
        pairs = zip(stops[FIXED], stops["estimated loss"], strict=True)
        more = interval(np.mean, [(a[1] > BEYOND) - float(b[1] > BEYOND) for a, b in pairs])
        about = f"{text}, {kind}: share overexposed, uncalibrated less calibrated"
        yield Finding(about, more, 0.0, 1)


def by_optimum(results: Results) -> Iterator[Finding]:
    """Where on the way R_f is least."""
    for text, kind, stops in results.paths():
        least = median([way for _, way in stops["least R_f"]])
        yield Finding(f"{text}, {kind}: way at which R_f is least", least, EARLY, -1)


def by_rounds(results: Results) -> Iterator[Finding]:
    """Of rounds against removal of what `match` finds."""
    matched = "raw, with duplicates"
    of = {(row["seed"], row["person"], row["way"]): row for row in results.copies}
    for way in dict.fromkeys(row["way"] for row in results.copies if "rounds" in row["way"]):
        for column, name in (("R_f", "R_f"), ("versions", "R_f of all versions")):
            pairs = [
                (row[column], of[seed, person, matched][column])
                for (seed, person, each), row in of.items()
                if each == way
            ]
            yield Finding(f"{name}: {way} ÷ {matched}", ratio(pairs), 1.0, -1)


def by_method(results: Results) -> Iterator[Finding]:
    """Of this package's directions against the paper's."""
    for text in results.tied:
        for name in ("applied", "newton"):
            for column, dose in DOSES.items():
                figure = results.ratio_of(text, METHODS[name], [PAPER], column)
                yield Finding(f"{text}, {dose}: {name} ÷ raw, first epoch", figure, 1.0, -1)


@cache
def by_chance(count: int) -> float:
    """The |rank correlation| of ``count`` pairs that one in twenty random scores exceeds."""
    generator, ranks = np.random.default_rng(0), np.arange(count, dtype=float)
    drawn = [abs(spearman(generator.permutation(ranks), ranks)) for _ in range(2000)]
    return float(np.quantile(drawn, 0.95))


def share_of(size: Row) -> float:
    """Bytes of the embedding, both of its sides, over those of all layers."""
    embedding = size["input side"] + size["output side"]
    blocks = sum(count for name, count in size.items() if ".h." in name)
    return float(embedding / (embedding + blocks))


CLAIMS: dict[str, tuple[str, Callable[[Results], Iterator[Finding]]]] = {
    "0": (
        "(control) The paper's ascent ends nearer to retraining than nothing, noise or another's",
        by_controls,
    ),
    "1": ("First-epoch gradients unlearn better than later or all epochs'", by_epochs),
    "2a": ("The embedding is the layer to unlearn in", by_layers),
    "2b": ("The last layers have no impact", by_last_blocks),
    "2c": ("Storing the embedding's gradients alone halves the storage", by_bytes),
    "3a": ("Products of Hessians, activations and gradients tell whom unlearning hits", by_rises),
    "3b": ("They tell how well unlearning succeeds", by_success),
    "4a": ("Calibrated ascent ends nearer to retraining than uncalibrated", by_nearness),
    "4b": ("Uncalibrated ascent overexposes more often than calibrated", by_exposure),
    "4c": ("Ascent meets a premature optimum", by_optimum),
    "5": ("Iterative unlearning is more complete than removal by fuzzy matching", by_rounds),
    "6": (
        "(ours) Undoing the optimizer's steps ends nearer to retraining than the paper's ascent",
        by_method,
    ),
}


def sentences(results: Results) -> list[str]:
    """One for each claim."""
    return [f"{n}. {sentence(claim, [*of(results)])}" for n, (claim, of) in CLAIMS.items()]
