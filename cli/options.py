"""Options that commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])


def _store(required: bool) -> Callable[[Function], Function]:
    return click.option(
        "-s",
        "--store",
        "store_path",
        type=click.Path(path_type=Path),
        envvar="GRADSTORE_STORE",
        required=required,
        show_envvar=True,
        help="The store's folder.",
    )


store_option, optional_store_option = _store(required=True), _store(required=False)


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


class _Bytes(click.ParamType[int]):
    """A number of bytes: 512MB, 2GB (powers of 1,024)."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Read it; anything else is a usage error."""
        found = re.fullmatch(r"([1-9]\d*)\s*(kb|mb|gb)?", str(value).strip().lower())
        if not found:
            self.fail(f"{value!r} is no size; expected a number with KB, MB or GB, as 512MB")
        return int(found[1]) << {None: 0, "kb": 10, "mb": 20, "gb": 30}[found[2]]


def bytes_option(name: str, default: str, text: str) -> Callable[[Function], Function]:
    """An option of a number of bytes, as 512MB or 2GB (powers of 1,024)."""
    return click.option(name, type=_Bytes(), default=default, show_default=True, help=text)


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
