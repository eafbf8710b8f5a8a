"""The ``gradstore`` command."""

from __future__ import annotations

from typing import Any

import click

from gradstore import __version__
from gradstore.errors import GradstoreError, SettingsError

from .audit import audit
from .calibrate import calibrate
from .compact import compact
from .demo import demo
from .erase import erase
from .eval import eval_
from .export import export
from .forget import forget
from .ingest import ingest
from .init import init
from .list import list_
from .match import match
from .output import visible
from .receipt import receipt
from .report import report
from .runs import runs
from .schema import schema
from .show import show
from .sketch import sketch
from .sql import sql
from .stats import stats
from .top import top
from .verify import verify


class _Commands(click.Group):
    """Commands in the order of a day's work.

    The library's errors become one line and exit 1, or 2 where settings contradict each other.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SettingsError as error:
            raise click.UsageError(str(error)) from error
        except GradstoreError as error:
            raise click.ClickException(visible(str(error))) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gradstore")
def cli() -> None:
    """Keep every training sample's gradient, forget a sample by its id, ask SQL about it.

    \b
    A day's work:
      gradstore init store
      gradstore ingest people.jsonl -s store --model base --out trained --epochs-captured all
      gradstore forget p-0007 -s store --model trained --out forgotten
      gradstore sql "SELECT * FROM forgotten" -s store

    Exit codes: 0 fine, 1 error, 2 usage, 3 it ran but did not do all that was asked.
    """


_COMMANDS = (
    demo, init, ingest, list_, show, match, top, sketch, calibrate, forget, eval_, receipt, report,
    erase, audit, verify, compact, runs, sql, schema, export, stats,
)  # fmt: skip
for command in _COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Run the command line."""
    cli.main(prog_name="gradstore")
