"""``gradstore init``."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from .options import bytes_option
from .output import say


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--profile",
    type=click.Choice(["packed", "raw", "small"]),
    default="packed",
    show_default=True,
    help="Compress arrays (bit shuffle and LZ4), keep them as they lie in memory, or keep factors "
    "in eight bits (each row's cosine with its bfloat16 at least 0.9999).",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Precision of the stored factors.",
)
@click.option(
    "--segments",
    "url",
    metavar="URL",
    help="Keep segments on another file system: s3://BUCKET/FOLDER, file:///FOLDER, or what else "
    "fsspec opens. The catalog stays in STORE.",
)
@bytes_option("--cache-size", "16GB", "With --segments: how much of them is kept in STORE too.")
@click.option(
    "--encrypt",
    is_flag=True,
    help="Seal what is stored of each record under a key of its own.",
)
@click.option(
    "--key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="GRADSTORE_KEY_FILE",
    show_envvar=True,
    help="With --encrypt: the master key's file, made with a new key if there is none.",
)
def init(
    store: Path,
    profile: str,
    dtype: str,
    url: str | None,
    cache_size: int,
    encrypt: bool,
    key_file: Path | None,
) -> None:
    """Create an empty store.

    An encrypted one is read and written with the master key that GRADSTORE_KEY_FILE (its file) or
    GRADSTORE_KEY (its text: 32 bytes in hex or base64) gives. The store does not hold it: without
    it nothing can be read. `gradstore erase` shreds the key of a record, so that no backup of its
    segments is readable either, as long as the folder keys is in none.

    \b
    Examples:
      gradstore init store
      gradstore init store --segments s3://bucket/gradients
      gradstore init store --encrypt --key-file master.key
    """
    from gradstore.store import format

    if (profile, dtype) == ("small", "float32"):
        raise click.UsageError(
            "--profile small keeps factors in eight bits: leave out --dtype float32, "
            "or choose --profile packed"
        )
    source = click.get_current_context().get_parameter_source("key_file")
    if source is ParameterSource.COMMANDLINE and not encrypt:
        raise click.UsageError("--key-file is for an encrypted store: give --encrypt too")
    master = _master_key(store, key_file) if encrypt else None
    elsewhere = None if url is None else format.Elsewhere(url, cache_size)
    format.create(store, profile, dtype, elsewhere, master)
    say(f"created {store}; next: gradstore ingest DATA -s {store} --model MODEL --out CHECKPOINT")
    if encrypt and key_file is not None:
        say(f"for every other command: export GRADSTORE_KEY_FILE={key_file.absolute()}")


def _master_key(store: Path, file: Path | None) -> bytes:
    """The master key of a store that is to be made: from a file, else from the environment."""
    from gradstore.store import format, keys

    if file is None:
        if (given := keys.from_environment()) is None:
            raise click.UsageError(
                "--encrypt wants a master key: name its file with --key-file FILE (made if there "
                "is none), or put its text into GRADSTORE_KEY"
            )
        return given
    if file.resolve().is_relative_to(store.resolve()):
        raise click.UsageError(f"--key-file {file} is inside of the store: keep the key elsewhere")
    if file.exists():
        return keys.read_file(file)
    format.refuse_taken(store)
    made = keys.new_file(file)
    say(f"made a new master key, {file}: keep a copy where the store's backups are not")
    return made
