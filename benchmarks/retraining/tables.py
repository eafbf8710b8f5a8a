"""What was measured, as tables and a plot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import plotext
from rich.table import Table

WIDE = 190  # columns, for tables that are not cut
CHECKS = ("membership", "relearning", "rounding")  # shares of requests that pass, with --attacks


def summary_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Medians over requests, by their size and the method; ``half``: share with R_f ≤ 0.5."""
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if "R_f" in row:
            groups[row["records"], row["direction"]].append(row)
    return [
        {
            "records": records,
            "method": method,
            "requests": len(of),
            "R_f": median(row["R_f"] for row in of),
            "best_R_f": median(row.get("best_R_f", row["R_f"]) for row in of),
            "worst_R_f": max(row["R_f"] for row in of),
            "half": sum(row["R_f"] <= 0.5 for row in of) / len(of),
            "Δ": median(row["Δ"] for row in of),
            "KL_h_over_floor": median(row["KL_h"] / row["KL_h_floor"] for row in of),
            "way": median(
                (row["after"] - row["before"]) / (row["reference"] - row["before"]) for row in of
            ),
            "end_rms": _rms(row["after"] - row["reference"] for row in of),
            "beaten": _share(row.get("beaten") for row in of),
            **_estimates(of),
            **{check: _share(row.get(check) for row in of) for check in CHECKS},
        }
        for (records, method), of in sorted(groups.items(), key=lambda group: group[0][0])
    ]


def _estimates(of: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """How well the loss of a record never trained on was estimated: by the tool, by held-out."""
    known = [(row["target"], row["reference"]) for row in of if row.get("target")]
    return {
        "target_rms": _rms(target["loss"] - true for target, true in known),
        "in_range": _share(target["low"] <= true <= target["high"] for target, true in known),
        "held_out_rms": _rms(row["held_out_estimate"] - row["reference"] for row in of),
    }


def _rms(errors: Iterable[float]) -> float | None:
    squares = [error**2 for error in errors]
    return (sum(squares) / len(squares)) ** 0.5 if squares else None


def _share(passed: Iterable[bool | None]) -> float | None:
    tried = [each for each in passed if each is not None]
    return sum(tried) / len(tried) if tried else None


def trade_off(summary: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A plot for each size of request: how near to retraining, against what it cost the others."""
    for records in sorted({row["records"] for row in summary}):
        plotext.clf()
        plotext.theme("clear")
        plotext.plotsize(90, 18)
        plotext.title(f"{records} at once: R_f (down is nearer) against Δ retained (left is less)")
        of_size = [row for row in summary if row["records"] == records]
        for marker, row in zip("abcdefghijkl", of_size, strict=False):
            label = f"{marker} {row['method']}"
            plotext.scatter([row["Δ"]], [min(row["R_f"], 2.0)], label=label, marker=marker)
        plotext.ylim(0, 2)
        yield plotext.uncolorize(plotext.build())


def table_of_summary(summary: Sequence[Mapping[str, Any]]) -> Table:
    """Without what was not measured."""
    columns = [name for name in summary[0] if any(row[name] is not None for row in summary)]
    table = Table(*columns, title="medians over requests")
    for row in summary:
        cells = (row[name] for name in columns)
        table.add_row(
            *(f"{x:.3g}" if isinstance(x, float) else "" if x is None else str(x) for x in cells)
        )
    return table


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = {
        "request": "{request}", "direction": "{direction}", "verdict": "{verdict}",
        "loss": "{before:.3f}", "after": "{after:.3f}", "reference": "{reference:.3f}",
        "KL_f": "{KL_f:.4f}", "R_f": "{R_f:.2f}", "best @ dose": "{best_R_f:.2f} @ {best_dose:.3g}",
        "Δ": "{Δ:+.4f}", "KL_h (floor)": "{KL_h:.4f} ({KL_h_floor:.4f})", "dose": "{dose:.3g}",
        "seconds": "{seconds:.1f}", "retraining": "{retraining:.0f}",
    }  # fmt: skip
    table = Table(*columns, title="against retraining without the forgotten records")
    for row in rows:
        table.add_row(*(_filled(cell, row) for cell in columns.values()))
    return table


def _filled(cell: str, row: Mapping[str, Any]) -> str:
    try:
        return cell.format_map(row)
    except KeyError:  # refused: nothing was written, so there is no after
        return "–"
