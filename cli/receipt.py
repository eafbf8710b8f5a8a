"""``gradstore receipt``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import output_options, store_option
from .output import emit, hush, print_json, say

FAILED_CHECK = 3
_path = click.Path(path_type=Path)
_number = click.argument("number", type=click.IntRange(min=1))


@click.group()
def receipt() -> None:
    """Show, check and sign the receipts of forget requests.

    \b
    Examples:
      gradstore receipt show 1 -s store
      gradstore receipt verify 1 -s store
    """


@receipt.command()
@_number
@store_option
def show(number: int, store_path: Path) -> None:
    """Print the receipt of request NUMBER as JSON.

    \b
    Example:
      gradstore receipt show 1 -s store > receipt.json
    """
    from gradstore.store import Store
    from gradstore.unlearn.receipt import read

    print_json(read(Store.open(store_path), number))


@receipt.command()
@_number
@store_option
@click.option("--model-in", type=_path, help="Checkpoint before.  [default: the request's --model]")
@click.option("--model-out", type=_path, help="Checkpoint after.  [default: the request's --out]")
@click.option("--public-key", type=_path, help="Check the signature with this Ed25519 key (PEM).")
@output_options
def verify(
    number: int,
    store_path: Path,
    model_in: Path | None,
    model_out: Path | None,
    public_key: Path | None,
    output: str,
) -> None:
    """Check the receipt of request NUMBER against the files it speaks of.

    The new checkpoint is made again from the old one and the stored update, in a temporary folder
    (not that of --exact, which training made). Exit code 3 says that a check failed.

    \b
    Examples:
      gradstore receipt verify 1 -s store
      gradstore receipt verify 1 -s store --model-in trained --public-key public.pem
    """
    from gradstore.store import Store
    from gradstore.unlearn.receipt import read

    store = Store.open(store_path)
    read(store, number)  # one that is not there is told before torch is loaded

    hush()

    from gradstore.unlearn.verify import verify as check

    checks = check(store, number, model_in, model_out, public_key)
    emit([vars(each) for each in checks], output)
    failed = [each.check for each in checks if each.passed is False]
    if failed:
        say(f"receipt {number} does not hold: {', '.join(failed)}")
        raise SystemExit(FAILED_CHECK)
    say(f"receipt {number} holds")


@receipt.command()
@_number
@store_option
@click.option("--key", type=_path, required=True, help="Private Ed25519 key (PEM, no password).")
def sign(number: int, store_path: Path, key: Path) -> None:
    """Sign the receipt of request NUMBER; the signature is kept beside it.

    \b
    Example:
      openssl genpkey -algorithm ed25519 -out key.pem
      openssl pkey -in key.pem -pubout -out public.pem
      gradstore receipt sign 1 -s store --key key.pem
    """
    from gradstore.store import Store
    from gradstore.unlearn.signature import sign as carry_out

    say(f"wrote {carry_out(Store.open(store_path), number, key)}")
