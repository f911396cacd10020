"""``lora2serve push`` and ``lora2serve pull-check``."""

from __future__ import annotations

import click


@click.command()
def push() -> None:
    """Push exports to the Hugging Face Hub, card included."""


@click.command("pull-check")
def pull_check() -> None:
    """Pull a pushed export back and verify it."""
