"""``lora2serve inspect`` and ``lora2serve doctor``."""

from __future__ import annotations

import click


@click.command()
def inspect() -> None:
    """Say what an adapter or export is, and which targets can serve it, or why not."""


@click.command()
def doctor() -> None:
    """Show devices, engines and versions, what is missing, and the command that brings it."""
