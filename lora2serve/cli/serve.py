"""``lora2serve serve``."""

from __future__ import annotations

import click


@click.command()
def serve() -> None:
    """Start the engine that an export is for, or print its command."""
