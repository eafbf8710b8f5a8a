"""The picture of the page: R_f by epoch, and along the path of ascent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from claims.results import OURS, PAPER, Results

COLOURS = {"raw": "#c2410c", "applied": "#0a7f5a"}
STYLES = ("-", "--")


def draw(results: Results, file: Path) -> None:
    """Write an SVG of medians over records; the same rows give the same bytes."""
    from matplotlib import rc_context

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    by_epoch, by_dose = figure.subplots(1, 2, sharey=True)
    for text, style in zip(results.tied, STYLES, strict=False):
        for way in (PAPER, OURS):
            kind = str(way["kind"])
            look = {"color": COLOURS[kind], "linestyle": style, "label": f"{kind}, {text}"}
            ways = [each for each in results.epochs.values() if each["kind"] == kind][:-1]
            found = [[*results.of(text, each, "R_f").values()] for each in ways]
            at = [epoch for epoch, values in enumerate(found, 1) if values]
            by_epoch.plot(at, [np.median(found[epoch - 1]) for epoch in at], **look)
            paths = np.array([*results.of(text, way, "path").values()])
            by_dose.plot(paths[0, :, 0], np.median(paths[:, :, 1], axis=0), **look)
    by_epoch.set(xlabel="epoch whose gradient is taken", ylabel="R_f", yscale="log")
    by_dose.set(xlabel="dose ÷ the one that meets the retrained loss")
    for axes in (by_epoch, by_dose):
        axes.axhline(1.0, color="#888", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    by_epoch.set_title("at the retrained loss", fontsize="medium")
    by_dose.set_title("along the path of ascent", fontsize="medium")
    by_dose.annotate(
        "doing nothing", (4, 1), (0, -3), textcoords="offset points",
        ha="right", va="top", fontsize="small", color="#666",
    )  # fmt: skip
    by_dose.legend(fontsize="small", frameon=False)
    with rc_context({"svg.hashsalt": "paper", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
