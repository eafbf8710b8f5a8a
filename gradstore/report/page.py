"""Facts into HTML: one file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from datetime import UTC, date, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from gradstore import __version__
from gradstore.errors import ReportError, StoreExists
from gradstore.report import clock, redact, request, run, words
from gradstore.report.text import texts_of
from gradstore.store.files import replace_durably, write_durably, writing
from gradstore.store.store import Store

WORST = 20  # of the ledger
_HERE = files("gradstore.report")


def request_page(
    store: Store, number: int, *, model: Path | None = None, redacted: bool = False
) -> str:
    """The page of a forget request; ``model`` is a checkpoint whose tokenizer reads the tokens.

    Raises :class:`IdError`, :class:`ModelError`, or :class:`ReportError` without the extra.
    """
    _plots()  # that the extra is missing is told before torch is loaded
    facts = request.gather(store, number, lambda: texts_of(store, number, model))
    if redacted:
        facts = redact.request(facts, redact.names(store))
    return render_request(facts)


def render_request(facts: request.Request) -> str:
    """The page of a request's facts. Raises :class:`ReportError`."""
    plots = _plots()
    stays = [stay for stay in facts.stays if stay.rise is not None]
    return _render(
        "request.html",
        title=f"Forget request {facts.number}",
        facts=facts,
        worst=stays[:WORST],
        measured=len(stays),
        path=plots.path(facts.path, facts.target, facts.reference) if facts.path else None,
        trade_off=plots.trade_off(facts.path, facts.target) if len(facts.path) > 1 else None,
        strips=plots.strips(facts.records, facts.stays, facts.target) if facts.records else None,
        relearning={
            e.number: plots.relearning(e.relearned, e.number)
            for e in facts.evaluations
            if e.relearned
        },
    )


def run_page(store: Store, name: str, *, redacted: bool = False) -> str:
    """The page of a training run. Raises :class:`IdError` or :class:`ReportError`."""
    plots = _plots()
    facts = run.gather(store, name)
    if redacted:
        facts = redact.run(facts)
    return _render(
        "run.html",
        title=f"Training run {facts.name}",
        facts=facts,
        curves=plots.epochs(facts.epochs) if facts.epochs else None,
    )


def index_page(store: Store, today: date, *, redacted: bool = False) -> str:
    """All requests with their clock, as it stands on ``today``. Raises :class:`ReportError`."""
    rows: Iterable[clock.Row] = clock.gather(store, today)
    if redacted:
        rows = redact.rows(rows, redact.names(store))
    return _render(
        "index.html", title="Forget requests", rows=list(rows), today=today, redacted=redacted
    )


def today() -> date:
    """In UTC, as all times of the catalog."""
    return datetime.now(UTC).date()


def check_out(out: Path, force: bool) -> None:
    """Raise :class:`StoreExists` if the file is there, unless ``force``."""
    if out.exists() and not force:
        raise StoreExists(f"{out} exists; choose another place, or add --force to replace it")


def save(page: str, out: Path, *, force: bool = False) -> None:
    """Write a page. Raises :class:`StoreExists` if the file is there, unless ``force``."""
    check_out(out, force)
    temporary = out.with_name(f".tmp-{out.name}")
    with writing(out):
        try:
            temporary.unlink(missing_ok=True)
            write_durably(temporary, [page.encode()], private=False)
            replace_durably(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)


# -- what templates call -------------------------------------------------------------------------


def _number(value: float | None, digits: int = 3) -> str:
    """With so many decimals; a dash where nothing is known."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "∞" if value > 0 else "not a number"
    return f"{value:.{digits}f}".replace("-", "−")


def _change(value: float | None, digits: int = 3) -> str:
    """The same with its sign."""
    said = _number(value, digits)
    return said if value is None or said[0] in "−n–" else f"+{said}"


def _short(value: float | None, digits: int = 5) -> str:
    """With so many significant digits: figures of all sizes in one column."""
    if value is None or not math.isfinite(value):
        return _number(value)
    return f"{value:.{digits}g}".replace("-", "−")


def _size(bytes: float | None) -> str:
    if bytes is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if bytes < 1000 or unit == "GB":
            break
        bytes /= 1000
    return f"{bytes:.0f} {unit}" if unit == "B" else f"{bytes:.1f} {unit}"


def _heat(rise: float | None) -> str:
    """The class of a token: how far its loss rose (r1 to r5) or fell (f), in steps of the legend.

    The same in every report, so that two pages can be compared.
    """
    if rise is None or not math.isfinite(rise):
        return ""
    if rise <= -words.STEPS[0]:
        return "f"
    step = sum(rise >= edge for edge in words.STEPS)
    return f"r{step}" if step else ""


def _said(value: Any) -> str:
    """A setting's value in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _marked(text: str) -> Any:
    """What is between backticks is code."""
    from markupsafe import Markup, escape  # comes with jinja2

    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _visible(text: str) -> str:
    """What a token says, with its line ends to be seen."""
    return text.replace("\r", "").replace("\n", "⏎") or "·"


def _render(template: str, **facts: Any) -> str:
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
    except ImportError as error:
        raise _missing() from error
    environment = Environment(
        loader=FunctionLoader(lambda name: _HERE.joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "change": _change,
        "short": _short,
        "size": _size,
        "heat": _heat,
        "visible": _visible,
        "said": _said,
        "marked": _marked,
    }
    return environment.get_template(template).render(version=__version__, words=words, **facts)


def _plots() -> Any:
    try:
        from gradstore.report import plots
    except ImportError as error:
        raise _missing() from error
    return plots


def _missing() -> ReportError:
    return ReportError(
        "reports need jinja2 and matplotlib, which are not installed; "
        "run `pip install 'gradstore[report]'`"
    )
