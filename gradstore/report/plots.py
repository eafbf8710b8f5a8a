"""Charts as SVG that stands in a page: its text and its colours are the page's own."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from gradstore.report import evidence, words
from gradstore.report.request import Point, Record, Stay, Target
from gradstore.report.run import Epoch

# Matplotlib wants colours that it knows; the page's style sheet has the true ones, light and dark.
INK, SOFT, LINE, ACCENT = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", ACCENT: "accent"}
_WIDTH = 9.6  # inches of 72 points: as wide as the column, so that 12 points are 12 pixels
_STYLE: Any = {
    "svg.fonttype": "none",
    "path.simplify": False,
    "font.family": "DejaVu Sans",  # comes with Matplotlib: the layout is the same everywhere
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "figure.constrained_layout.use": True,
}

Xs = Sequence[float]
Ys = Sequence[float | None]


def path(points: Sequence[Point], target: Target | None, reference: float | None) -> str:
    """The mean losses at every dose that was tried, with what was foretold and aimed at."""
    doses = [point.dose for point in points]
    with mpl.rc_context(_STYLE):
        figure, axes = _axes("dose, as a multiple of the correction", 3.7)
        losses = [p.forget for p in points] + [p.holdout or 0 for p in points]
        aims = [target.loss, target.high] if target else []
        top = 1.12 * max(x for x in [*losses, *aims, reference] if x is not None and _is(x)) or 1.0
        labels = []
        if target is not None:
            labels.append(_aim(axes, target, top))
        if reference is not None:
            axes.axhline(reference, color=INK, linewidth=1, linestyle=(0, (1, 2)))
            labels.append((reference, "never saw it", INK))
        for values, name, colour, style in (
            ([p.forecast for p in points], "foretold", ACCENT, "--"),
            ([p.holdout for p in points], "held-out", SOFT, "-"),
            ([p.retained for p in points], "retained", INK, "-"),
            ([p.forget for p in points], "forgotten", ACCENT, "-"),
        ):
            labels += _line(axes, doses, values, name, colour, style, top)
        for point in points:
            if point.chosen:
                axes.plot(point.dose, point.forget, "o", color=ACCENT, markersize=11, zorder=5)
                axes.axvline(point.dose, color=LINE, linewidth=1, zorder=0)
                left = point.dose > max(doses) / 2
                axes.annotate(
                    f"dose {point.dose:.3g}", (point.dose, 1), (-6 if left else 6, -2),
                    xycoords=("data", "axes fraction"), textcoords="offset points",
                    ha="right" if left else "left", va="top", color=ACCENT,
                )  # fmt: skip
        axes.set_ylim(0, top)
        _beside(axes, labels)
        return _svg(figure, "path", "Mean loss of the forgotten, retained and held-out records "
                    "at every dose tried")  # fmt: skip


def trade_off(points: Sequence[Point], target: Target | None) -> str:
    """What the records that stay paid for what the forgotten ones rose."""
    start = points[0]
    with mpl.rc_context(_STYLE):
        figure, axes = _axes("loss of the forgotten, nats per token", 3.2, "rise of the others")
        labels = []
        for name, colour in (("holdout", SOFT), ("retained", INK)):
            first = getattr(start, name)
            rises = [_minus(getattr(point, name), first) for point in points]
            said = "held-out" if name == "holdout" else name
            labels += _line(axes, [p.forget for p in points], rises, said, colour, "-")
            for point, rise in zip(points, rises, strict=True):
                if point.chosen and rise is not None:
                    axes.plot(point.forget, rise, "o", color=colour, markersize=10, zorder=5)
        axes.axhline(0, color=LINE, linewidth=1, zorder=0)
        if target is not None and _is(target.loss):
            axes.axvline(target.loss, color=ACCENT, linewidth=1, linestyle="--", zorder=0)
            axes.annotate(
                "target", (target.loss, 1), (-5, -4), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="right", va="top", color=ACCENT,
            )  # fmt: skip
        _beside(axes, labels, max(filter(_is, (point.forget for point in points)), default=0.0))
        return _svg(figure, "trade", "Rise of the loss of retained and held-out records against "
                    "the loss of the forgotten")  # fmt: skip


def strips(records: Sequence[Record], stays: Sequence[Stay], target: Target | None) -> str:
    """Every record's loss, a mark each: before above, after below."""
    rows: list[tuple[str, list[float], list[float]]] = [
        (
            "forgotten",
            [r.before for r in records],
            [r.after for r in records if r.after is not None],
        )
    ]
    for role in sorted({stay.role for stay in stays}, key=words.place):
        of = [stay for stay in stays if stay.role == role]
        after = [stay.after for stay in of if stay.after is not None]
        rows.append((words.role(role), [stay.before for stay in of], after))
    with mpl.rc_context(_STYLE):
        figure, axes = _axes("loss, nats per token", 0.75 + 0.75 * len(rows), "")
        for at, (_, before, after) in enumerate(rows):
            colour = INK if at else ACCENT
            _ticks(axes, before, -at + 0.06, SOFT)
            _ticks(axes, after, -at - 0.30, colour)
        if target is not None and _is(target.loss):
            if target.high is not None and _is(target.high) and target.low is not None:
                axes.fill_betweenx(
                    [-0.42, 0.42], target.low, target.high, color=ACCENT, alpha=0.13, linewidth=0
                )
            axes.vlines(target.loss, -0.42, 0.42, color=ACCENT, linewidth=1, linestyle="--")
        axes.set_yticks([-at for at in range(len(rows))], [name for name, *_ in rows])
        axes.set_ylim(0.6 - len(rows), 0.5)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        return _svg(figure, "strips", "Loss of every measured record before and after")


def epochs(found: Sequence[Epoch]) -> str:
    """Loss of the members as they were met in each epoch, and of the held-out after it."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes("epochs of training", 3.4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        labels = _line(
            axes, [e.epoch - 0.5 for e in found], [e.members for e in found], "trained on",
            ACCENT, "-",
        )  # fmt: skip
        labels += _line(
            axes, [e.epoch for e in found], [e.holdout for e in found], "held-out", SOFT, "-"
        )
        axes.set_ylim(bottom=0)
        _beside(axes, labels)
        return _svg(figure, "epochs", "Mean loss of records trained on and held out, by epoch")


def relearning(found: Sequence[evidence.Figure], number: int) -> str:
    """Loss of the rest of the forgotten while a few of their tokens are taught again."""
    steps = list(range(len(found)))
    with mpl.rc_context(_STYLE):
        figure, axes = _axes("steps of relearning", 2.8)
        labels = []
        for name, said, colour, style in (
            ("original", "before forgetting", SOFT, "-"),
            ("reference", "never saw it", INK, ":"),
            ("model", "after forgetting", ACCENT, "-"),
        ):
            values = [getattr(each, name) for each in found]
            labels += _line(axes, steps, values, said, colour, style)
        axes.set_ylim(bottom=0)
        _beside(axes, labels)
        return _svg(figure, f"relearning{number}", "Loss while the forgotten is taught again")


# -- drawing -------------------------------------------------------------------------------------

Label = tuple[float, str, str]  # height, text, colour


def _axes(across: str, height: float, up: str = "loss, nats per token") -> tuple[Figure, Axes]:
    figure = Figure((_WIDTH, height))
    axes = figure.add_subplot()
    axes.set_xlabel(across)
    axes.set_title(up, loc="left", fontsize=12, color=SOFT)
    return figure, axes


def _line(
    axes: Axes, xs: Xs, ys: Ys, name: str, colour: str, style: str, top: float = math.inf
) -> list[Label]:
    """Draw what is known; returns the label for its end, at most at ``top``."""
    known = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None and _is(x) and _is(y)]
    if not known:
        return []
    marker = "" if style == "--" else "."
    axes.plot(*zip(*known, strict=True), style, marker=marker, color=colour)
    return [(min(known[-1][1], 0.97 * top), name, colour)]


def _aim(axes: Axes, target: Target, top: float) -> Label:
    if target.low is not None and target.high is not None and target.high > target.low:
        axes.axhspan(target.low, min(target.high, top), color=ACCENT, alpha=0.13, linewidth=0)
    axes.axhline(target.loss, color=ACCENT, linewidth=1, linestyle=(0, (4, 4)))
    return target.loss, "target", ACCENT


def _ticks(axes: Axes, values: Iterable[float], bottom: float, colour: str) -> None:
    """A vertical mark at every value, all in one path: a hundred elements would be heavy."""
    corners = [(x, y) for x in values if _is(x) for y in (bottom, bottom + 0.24)]
    if corners:
        codes = [Path.MOVETO, Path.LINETO] * (len(corners) // 2)
        axes.add_patch(PathPatch(Path(corners, codes), edgecolor=colour, fill=False, linewidth=1.5))
        axes.update_datalim(corners)
        axes.autoscale_view()


def _beside(axes: Axes, labels: Sequence[Label], end: float | None = None) -> None:
    """Name the lines at their ends, apart enough to be read: right of the plot, or of ``end``."""
    low, high = axes.get_ylim()
    height = axes.get_figure().get_size_inches()[1] * 72 - 70  # type: ignore[union-attr]
    least = 15 / height
    places: list[float] = []
    for y, text, colour in sorted(labels):
        wanted = (y - low) / (high - low)
        place = max(wanted, places[-1] + least) if places else wanted
        places.append(place)
        axes.annotate(
            text, (1 if end is None else end, place), (10, 0), textcoords="offset points",
            xycoords=("axes fraction" if end is None else "data", "axes fraction"),
            va="center", color=colour,
        )  # fmt: skip


def _svg(figure: Figure, name: str, said: str) -> str:
    """The figure as an element of HTML: no ids but those referred to, no colours but the page's."""
    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):  # ids differ between the charts of a page
        figure.savefig(
            file, format="svg", transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )  # fmt: skip
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    for pattern, instead in (
        (r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", ""),
        (r'\s+id="[a-zA-Z0-9.]+_\d+"', ""),
        (r"\s+xmlns(:xlink)?=\"[^\"]*\"", ""),
        (r"xlink:href", "href"),
        (r"font: (?:[a-z]+ )*([\d.]+)px [^;\"]*", r"font-size: \1px"),
        (r"\s*\n\s*", "\n"),
    ):
        drawn = re.sub(pattern, instead, drawn, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        drawn = drawn.replace(colour, f"var(--{variable})")
    [box] = re.findall(r'viewBox="[^"]*"', drawn)
    start = f'<svg {box} role="img"><title>{escape(said)}</title>'
    return re.sub(r"<svg[^>]*>", start, drawn, count=1).strip()


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _is(value: float) -> bool:
    return math.isfinite(value)
