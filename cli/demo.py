"""``gradstore demo``."""
import click
@click.command()
def demo() -> None:
    """Train, capture, forget and ask, on fictional people (offline, about a minute)."""
