"""The tables, and the page that shows them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from influence import spearman

from claims.findings import BEYOND, CLAIMS, METHODS, sentences
from claims.results import Results, Row
from claims.verdicts import Table, interval, median, told

MARKS = "<!-- printed by benchmarks/paper_claims.py -->", "<!-- end -->"


def tables(results: Results) -> list[Table]:
    """In the order of the claims, then what each was judged by."""
    found = [ways_of(results, f"1. {text}: epochs", text, results.epochs) for text in results.tied]
    for text in results.texts:
        found.append(ways_of(results, f"2. {text}: layers", text, results.layers(text)))
    found += [stored(results), scores(results), stops(results), duplicates(results)]
    found += [ways_of(results, f"6. {text}: methods", text, METHODS) for text in results.tied]
    return found + [judged(results, number) for number in CLAIMS]


def write(results: Results, page: Path, note: str) -> None:
    """Put sentences, a note on the run and tables between the marks of a page."""
    said = "\n".join(f"- {each}" for each in sentences(results))
    picture = f"![R_f by epoch, and along the path of ascent]({page.with_suffix('.svg').name})"
    put(page, "\n\n".join([said, note, picture, *(t.markdown() for t in tables(results))]))


def ways_of(results: Results, title: str, text: str, ways: Mapping[str, Row]) -> Table:
    """Directions of one text, a row each."""
    header = [
        "",
        "n",
        "R_f, matched",
        "Δ",
        "KL_h",
        "R_f, equal norm",
        "way there",
        "R_f, own dose",
    ]
    rows = []
    for name, way in ways.items():
        columns = [
            results.of(text, way, column) for column in ("R_f", "Δ", "KL_h", "equal R_f", "own R_f")
        ]
        if not any(columns):
            continue
        floor, gone = results.of(text, way, "KL_h_floor"), results.way(text, way, "equal loss")
        nearest, rise, held_out, equal, own = columns
        rows.append(
            [
                name, str(len(nearest)), told(median([*nearest.values()])),
                "–" if not rise else f"{np.median([*rise.values()]):+.3f}",
                _plain([held_out[pair] / floor[pair] for pair in held_out]),
                told(median([*equal.values()])),
                _plain([*gone.values()]),
                told(median([*own.values()])),
            ]
        )  # fmt: skip
    return Table(title, header, rows)


def stored(results: Results) -> Table:
    """Bytes by layer."""
    header = ["", "input side", "both sides", "blocks", "everything", "embedding ÷ everything",
              "the same in weights"]  # fmt: skip
    rows = []
    for text, size in results.sizes.items():
        of, weights = size["bytes"], size["weights"]
        blocks = sum(count for name, count in of.items() if ".h." in name)
        both = of["input side"] + of["output side"]
        kept = [of["input side"], both, blocks, both + blocks]
        share = f"{of['input side'] / kept[-1]:.2f} to {both / kept[-1]:.2f}"
        in_weights = f"{weights['embedding'] / weights['all']:.2f}"
        rows.append([text, *(f"{each / 1024:.0f} kB" for each in kept), share, in_weights])
    return Table("2. Stored for a sample and an epoch", header, rows)


def scores(results: Results) -> Table:
    """Rank correlations of each score."""
    header = ["", "direction", "score", "ρ with the loss rise of those that stay",
              "ρ of its own score with R_f"]  # fmt: skip
    rows = []
    for about, of in results.scored.items():
        own = [(row["own"], row["R_f"]) for row in of if row["own"] is not None]
        hit = interval(np.mean, [row["rho"] for row in of])
        success = interval(lambda x: spearman(x[:, 0], x[:, 1]), own)
        rows.append([*about, told(hit), told(success)])
    return Table("3. Scores", header, rows)


def stops(results: Results) -> Table:
    """Where ascent ends by each rule."""
    header = ["", "direction", "stops at", "R_f", "way", f"share beyond {BEYOND}"]
    rows = []
    for text, kind, stops in results.paths():
        falls = fmean(each for each, _ in stops.pop("falls", [(0.0, 0.0)]))
        for name, ends in stops.items():
            r, share = ([end[n] for end in ends] for n in (0, 1))
            beyond = f"{fmean(each > BEYOND for each in share):.2f}"
            rows.append([text, kind, name, told(median(r)), told(median(share)), beyond])
        rows.append([text, kind, "share of paths that fall", f"{falls:.2f}", "", ""])
    return Table("4. Where ascent stops", header, rows)


def duplicates(results: Results) -> Table:
    """People who stand in the data twice."""
    header = ["", "n", "loss", "R_f", "R_f, all versions", "telephone said", "Δ"]
    rows = []
    for way in dict.fromkeys(row["way"] for row in results.copies):
        of = [row for row in results.copies if row["way"] == way]
        figures = [median([row[name] for row in of]) for name in ("after", "R_f", "versions")]
        phone, rise = (float(np.mean([row[name] for row in of])) for name in ("phone", "Δ"))
        cells = [told(figure) for figure in figures]
        rows.append([way, str(len(of)), *cells, f"{phone:.2f}", f"{rise:+.3f}"])
    return Table("5. Synthetic, near-duplicates, at the retrained loss", header, rows)


def judged(results: Results, claim: str) -> Table:
    """The figures that a claim is judged by."""
    rows = [[f.about, told(f.figure), f.verdict] for f in CLAIMS[claim][1](results)]
    return Table(f"{claim}. Judged by", ["", "figure", "speaks"], rows)


def put(page: Path, body: str) -> None:
    """Replace what stands between the marks of a page; a new one has nothing else."""
    text = page.read_text(encoding="utf-8") if page.exists() else "\n".join(MARKS) + "\n"
    between = re.compile(re.escape(MARKS[0]) + ".*" + re.escape(MARKS[1]), re.DOTALL)
    whole = f"{MARKS[0]}\n{body}\n{MARKS[1]}"
    page.write_text(between.sub(lambda _: whole, text), encoding="utf-8")


def _plain(values: Sequence[float]) -> str:
    return f"{np.median(values):.2f}" if values else "–"
