"""Options that commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])

store_option = click.option(
    "-s",
    "--store",
    "store_path",
    type=click.Path(path_type=Path),
    envvar="GRADSTORE_STORE",
    required=True,
    show_envvar=True,
    help="The store's folder.",
)


def output_options(function: Function) -> Function:
    """``--json``, ``--csv`` or ``--table`` (the default), as the argument ``output``."""
    forms = {
        "json": "Print JSON.",
        "csv": "Print CSV with a header.",
        "table": "Print a table (the default).",
    }
    for form, text in reversed(forms.items()):
        option = click.option(
            f"--{form}", "output", flag_value=form, default=form == "table", help=text
        )
        function = option(function)
    return function


def parsed(parse: Callable[[str], Any]) -> Callable[[Any, Any, str | None], str | None]:
    """A callback that checks an option's text with the library's parser: bad ones are usage."""

    def check(_: Any, __: Any, text: str | None) -> str | None:
        try:
            if text is not None:
                parse(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error
        return text

    return check
