"""What follows from the rows: tables, a sentence for each claim, the page that shows them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from influence import spearman

from claims.verdicts import Finding, Table, exactly, interval, median, ratio, sentence, told

Row = Mapping[str, Any]
MARKS = "<!-- printed by benchmarks/paper_claims.py -->", "<!-- end -->"
DOSES = {"R_f": "matched", "equal R_f": "equal norm"}
NAMED = {"first": "epoch 1", "all": "all epochs"}
SLIGHT = 0.05  # of that way: nothing
BEYOND = 1.1  # of the way to the retrained model's loss: over-exposed
CLAIMS = (
    "First-epoch gradients unlearn better than later or all epochs'",
    "The embedding is the layer to unlearn in, the last blocks do nothing, and storage halves",
    "Hessian-vector and activation-gradient products tell whom unlearning hits, and its success",
    "Ascent has to be calibrated: else it overexposes, or stops in a premature optimum",
    "Iterative unlearning is more complete than removal by fuzzy matching",
    "(ours) Undoing the optimizer's steps ends nearer to retraining than the paper's ascent",
)
PAPER: dict[str, Any] = {"kind": "raw", "epochs": "first", "where": "embedding", "side": None}
OURS = PAPER | {"kind": "applied", "epochs": "all"}
METHODS = {
    "raw, first epoch (the paper)": PAPER,
    "applied": OURS,
    "newton": OURS | {"kind": "newton", "epochs": None},
    "fresh ascent": OURS | {"kind": "fresh", "epochs": None},
    "random direction": OURS | {"kind": "random", "epochs": None},
    "another record's gradient": OURS | {"kind": "other id", "epochs": None},
}


@dataclass(frozen=True)
class Results:
    """All rows of a run; ``copies`` are those of duplicates.py."""

    rows: Sequence[Row]
    scores: Sequence[Row]
    copies: Sequence[Row]
    sizes: Mapping[str, Any]

    def tables(self) -> list[Table]:
        """In the order of the claims, then what each was judged by."""
        found = [self._ways(f"1. {text}: epochs", text, self.epochs) for text in self.tied]
        for text in self.texts:
            found.append(self._ways(f"2. {text}: layers", text, self._layers(text)))
        found += [self._bytes(), self._ranks(), self._stops_table(), self._rounds()]
        found += [self._ways(f"6. {text}: methods", text, METHODS) for text in self.tied]
        found += [self._judged(number) for number in range(1, len(CLAIMS) + 1)]
        return found

    def sentences(self) -> list[str]:
        """One for each claim."""
        return [sentence(claim, self.findings(n)) for n, claim in enumerate(CLAIMS, 1)]

    def findings(self, claim: int) -> list[Finding]:
        """What a claim is judged by, numbered from 1."""
        each = (
            self._by_epochs, self._by_layers, self._by_scores, self._by_stops, self._by_rounds,
            self._by_method,
        )  # fmt: skip
        return list(each[claim - 1]())

    def as_json(self) -> dict[str, Any]:
        """Everything that was measured, and the sentences."""
        return {
            "sentences": self.sentences(), "rows": self.rows, "scores": self.scores,
            "copies": self.copies, "sizes": self.sizes,
        }  # fmt: skip

    def write(self, page: Path) -> None:
        """Put sentences and tables between the marks of a page."""
        said = "\n".join(f"{n}. {each}" for n, each in enumerate(self.sentences(), 1))
        picture = f"![R_f by epoch, and along the path of ascent]({page.with_suffix('.svg').name})"
        put(page, "\n\n".join([said, picture, *(table.markdown() for table in self.tables())]))

    # -- which rows ---------------------------------------------------------------------------

    @cached_property
    def texts(self) -> list[str]:
        """What was trained on."""
        return list(dict.fromkeys(row["text"] for row in self.rows))

    @cached_property
    def tied(self) -> list[str]:
        """Those whose model has a tied head."""
        return [text for text in self.texts if "untied" not in text]

    @cached_property
    def epochs(self) -> dict[str, Row]:
        """The ways of either kind, by the epochs that count."""
        last = max(int(row["epochs"]) for row in self.rows if str(row["epochs"]).isdigit())
        later = [str(epoch) for epoch in range(2, last + 1)]
        names = {"raw": ["first", *later, "all"], "applied": ["1", *later, "all"]}
        return {
            f"{kind}, {NAMED.get(epoch, f'epoch {epoch}')}": PAPER | {"kind": kind, "epochs": epoch}
            for kind, epochs in names.items()
            for epoch in epochs
        }

    def _layers(self, text: str) -> dict[str, Row]:
        """The ways of either kind, by the weights that move."""
        found = dict[str, Row]()
        for kind, epochs in (("raw", "first"), ("applied", "all")):
            for row in self.rows:
                if (row["text"], row["kind"], row["epochs"]) == (text, kind, epochs):
                    way = {name: row[name] for name in PAPER}
                    found[f"{kind}, {place_of(row['where'], row['side'])}"] = way
        return found

    def of(self, text: str, way: Row, column: str) -> dict[tuple[int, str], float]:
        """A column of a way's rows by (seed, record), without those that have none."""
        return {
            (row["seed"], row["id"]): row[column]
            for row in self.rows
            if row["text"] == text
            and all(row[name] == value for name, value in way.items())
            and row.get(column) is not None
        }

    def _ratio(self, text: str, one: Row, others: Sequence[Row], column: str) -> Any:
        """R_f of one way over that of others (their geometric mean), of the same records."""
        here, there = self.of(text, one, column), [self.of(text, o, column) for o in others]
        pairs = [
            (value, float(np.exp(np.mean([np.log(of[pair]) for of in there if pair in of]))))
            for pair, value in here.items()
            if any(pair in of for of in there)
        ]
        return ratio(pairs)

    def _way(self, text: str, way: Row, column: str) -> dict[tuple[int, str], float]:
        """A loss as a share of the way from the original's to the retrained model's."""
        before, after = (self.of(text, way, name) for name in ("before", "reference"))
        return {
            pair: (loss - before[pair]) / (after[pair] - before[pair])
            for pair, loss in self.of(text, way, column).items()
        }

    # -- what a claim is judged by ------------------------------------------------------------

    def _by_epochs(self) -> Iterator[Finding]:
        for text in self.tied:
            for kind in ("raw", "applied"):
                ways = [way for way in self.epochs.values() if way["kind"] == kind]
                first, later, last, every = ways[0], ways[1:-1], ways[-2:-1], ways[-1:]
                for name, others in (("later", later), ("last", last), ("all", every)):
                    for column, dose in DOSES.items():
                        figure = self._ratio(text, first, others, column)
                        yield Finding(f"{text}, {kind}, {dose}: first ÷ {name}", figure, 1.0, -1)

    def _by_layers(self) -> Iterator[Finding]:
        for text in self.texts:
            for kind, base in (("raw", PAPER), ("applied", OURS)):
                places = {way["where"] for way in self._layers(text).values()} - {"embedding"}
                blocks = [place for place in places if re.fullmatch(r"[\w.]+\*", place)]
                last = [place for place in places if "*," in place]
                against = {
                    "blocks, one by one": blocks,
                    "last two blocks": last,
                    "lm_head": ["head"],
                    "whole model": ["all"],
                }
                for name, where in against.items():
                    others = [base | {"where": place} for place in where if place in places]
                    for column, dose in DOSES.items() if others else ():
                        figure = self._ratio(text, base, others, column)
                        about = f"{text}, {kind}, {dose}: embedding ÷ {name}"
                        yield Finding(about, figure, 1.0, -1)
            size = self.sizes[text]["bytes"]
            yield Finding(
                f"{text}: stored embedding ÷ everything", exactly(share_of(size)), 0.5, -1
            )
            last = [
                way for name, way in self._layers(text).items() if name == "raw, last two blocks"
            ]
            if last:
                moved = median([*self._way(text, last[0], "equal loss").values()])
                about = f"{text}, raw, equal norm: way that the last two blocks go"
                yield Finding(about, moved, SLIGHT, -1)

    def _by_scores(self) -> Iterator[Finding]:
        for text, kind, method, hit, success in self._ranked():
            if method not in ("random", "slope along the update"):
                yield Finding(f"{text}, {method}: whom {kind} hits", hit, 0.0, 1)
                yield Finding(f"{text}, {method}: R_f of {kind}", success, 0.0, 0)

    def _by_stops(self) -> Iterator[Finding]:
        for text in self.tied:
            stops = self._stops(text, PAPER)
            fixed = stops["uncalibrated"]
            for name in ("estimated loss", "retrained loss"):
                pairs = [(a[0], b[0]) for a, b in zip(stops[name], fixed, strict=True)]
                yield Finding(f"{text}: R_f at {name} ÷ uncalibrated", ratio(pairs), 1.0, -1)
            beyond = interval(np.mean, [way > BEYOND for _, way in fixed])
            yield Finding(f"{text}: share overexposed, uncalibrated", beyond, 0.0, 1)
            least = median([way for _, way in stops["least R_f"]])
            yield Finding(f"{text}: way at which R_f is least", least, 1.0, -1)

    def _by_rounds(self) -> Iterator[Finding]:
        matched = "raw, with duplicates"
        of = {(row["seed"], row["person"], row["way"]): row for row in self.copies}
        for way in dict.fromkeys(row["way"] for row in self.copies if "rounds" in row["way"]):
            for column, name in (("R_f", "R_f"), ("versions", "R_f of all versions")):
                pairs = [
                    (row[column], of[seed, person, matched][column])
                    for (seed, person, each), row in of.items()
                    if each == way
                ]
                yield Finding(f"{name}: {way} ÷ {matched}", ratio(pairs), 1.0, -1)

    def _by_method(self) -> Iterator[Finding]:
        for text in self.tied:
            for name in ("applied", "newton"):
                for column, dose in DOSES.items():
                    figure = self._ratio(text, METHODS[name], [PAPER], column)
                    yield Finding(f"{text}, {dose}: {name} ÷ raw, first epoch", figure, 1.0, -1)

    def _ranked(self) -> Iterator[tuple[str, str, str, Any, Any]]:
        """Rank correlations of each score: with the others' rises, and of its own with R_f."""
        groups: dict[tuple[str, str, str], list[Row]] = {}
        for row in self.scores:
            groups.setdefault((row["text"], row["kind"], row["method"]), []).append(row)
        for (text, kind, method), of in groups.items():
            own = [(row["own"], row["R_f"]) for row in of if row["own"] is not None]
            hit = interval(np.mean, [row["rho"] for row in of])
            yield text, kind, method, hit, interval(lambda x: spearman(x[:, 0], x[:, 1]), own)

    def _stops(self, text: str, way: Row) -> dict[str, list[tuple[float, float]]]:
        """Where ascent ends by each rule: (R_f, way), a record each.

        Uncalibrated is the dose that suits the other records of the text: the median of theirs.
        """
        doses, paths = self.of(text, way, "dose"), self.of(text, way, "path")
        before, after = self.of(text, way, "before"), self.of(text, way, "reference")
        estimates, found = self.of(text, OURS, "estimate"), dict[str, list[tuple[float, float]]]()
        for pair in paths:
            dose, r, loss = np.array(paths[pair]).T
            share = (loss - before[pair]) / (after[pair] - before[pair])
            others = [each for other, each in doses.items() if other != pair] or [doses[pair]]
            guess = (estimates[pair] - before[pair]) / (after[pair] - before[pair])
            rising = np.maximum.accumulate(share)
            stops = {
                "uncalibrated": float(np.median(others)) / doses[pair],
                "estimated loss": float(np.interp(guess, rising, dose)),
                "retrained loss": 1.0,
                "least R_f": float(dose[1:][r[1:].argmin()]),
            }
            for name, at in stops.items():
                ends = float(np.interp(at, dose, r)), float(np.interp(at, dose, share))
                found.setdefault(name, []).append(ends)
            falls = float((np.diff(share[dose <= 1]) < 0).any())
            found.setdefault("falls", []).append((falls, falls))
        return found

    # -- tables -------------------------------------------------------------------------------

    def _ways(self, title: str, text: str, ways: Mapping[str, Row]) -> Table:
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
                self.of(text, way, column)
                for column in ("R_f", "Δ", "KL_h", "equal R_f", "own R_f")
            ]
            if not any(columns):
                continue
            floor, gone = self.of(text, way, "KL_h_floor"), self._way(text, way, "equal loss")
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

    def _bytes(self) -> Table:
        header = ["", "input side", "both sides", "blocks", "everything", "embedding ÷ everything",
                  "the same in weights"]  # fmt: skip
        rows = []
        for text, size in self.sizes.items():
            of, weights = size["bytes"], size["weights"]
            blocks = sum(count for name, count in of.items() if ".h." in name)
            both = of["input side"] + of["output side"]
            kept = [of["input side"], both, blocks, both + blocks]
            share = f"{of['input side'] / kept[-1]:.2f} to {both / kept[-1]:.2f}"
            in_weights = f"{weights['embedding'] / weights['all']:.2f}"
            rows.append([text, *(f"{each / 1024:.0f} kB" for each in kept), share, in_weights])
        return Table("2. Stored for a sample and an epoch", header, rows)

    def _ranks(self) -> Table:
        header = ["", "direction", "score", "ρ with the loss rise of those that stay",
                  "ρ of its own score with R_f"]  # fmt: skip
        rows = [[t, k, m, told(hit), told(own)] for t, k, m, hit, own in self._ranked()]
        return Table("3. Scores", header, rows)

    def _stops_table(self) -> Table:
        header = ["", "direction", "stops at", "R_f", "way", f"share beyond {BEYOND}"]
        rows = []
        for text in self.tied:
            for way in (PAPER, OURS):
                stops = self._stops(text, way)
                falls = fmean(each for each, _ in stops.pop("falls", [(0.0, 0.0)]))
                for name, ends in stops.items():
                    r, share = ([end[n] for end in ends] for n in (0, 1))
                    beyond = f"{fmean(each > BEYOND for each in share):.2f}"
                    rows.append(
                        [text, way["kind"], name, told(median(r)), told(median(share)), beyond]
                    )
                rows.append([text, way["kind"], "share of paths that fall", f"{falls:.2f}", "", ""])
        return Table("4. Where ascent stops", header, rows)

    def _rounds(self) -> Table:
        header = ["", "n", "loss", "R_f", "R_f, all versions", "telephone said", "Δ"]
        rows = []
        for way in dict.fromkeys(row["way"] for row in self.copies):
            of = [row for row in self.copies if row["way"] == way]
            figures = [median([row[name] for row in of]) for name in ("after", "R_f", "versions")]
            phone, rise = (float(np.mean([row[name] for row in of])) for name in ("phone", "Δ"))
            cells = [told(figure) for figure in figures]
            rows.append([way, str(len(of)), *cells, f"{phone:.2f}", f"{rise:+.3f}"])
        return Table("5. Synthetic, near-duplicates, at the retrained loss", header, rows)

    def _judged(self, claim: int) -> Table:
        rows = [[f.about, told(f.figure), f.verdict] for f in self.findings(claim)]
        return Table(f"{claim}. Judged by", ["", "figure", "speaks"], rows)


def put(page: Path, body: str) -> None:
    """Replace what stands between the marks of a page; a new one has nothing else."""
    text = page.read_text(encoding="utf-8") if page.exists() else "\n".join(MARKS) + "\n"
    between = re.compile(re.escape(MARKS[0]) + ".*" + re.escape(MARKS[1]), re.DOTALL)
    whole = f"{MARKS[0]}\n{body}\n{MARKS[1]}"
    page.write_text(between.sub(lambda _: whole, text), encoding="utf-8")


def share_of(size: Row) -> float:
    """Bytes of the embedding, both of its sides, over those of all layers."""
    embedding = size["input side"] + size["output side"]
    blocks = sum(count for name, count in size.items() if ".h." in name)
    return float(embedding / (embedding + blocks))


def place_of(where: str, side: str | None) -> str:
    """A pattern of layers in words."""
    if side is not None:
        return f"embedding, {side} side"
    if where == "all":
        return "whole model"
    if "*," in where:
        return "last two blocks"
    if match := re.fullmatch(r"transformer\.h\.(\d+)\.\*", where):
        return f"block {int(match[1]) + 1}"
    return {"head": "lm_head", "embedding,head": "embedding and lm_head"}.get(where, where)


def _plain(values: Sequence[float]) -> str:
    return f"{np.median(values):.2f}" if values else "–"
