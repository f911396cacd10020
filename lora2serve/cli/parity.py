"""``lora2serve parity``."""

from __future__ import annotations

from pathlib import Path

import click

from lora2serve.cli.common import find_run, progress


@click.command()
@click.argument("run", required=False)
@click.argument("exports", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where the report goes (default: the run's parity/).",
)
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
@click.pass_context
def parity(ctx: click.Context, run: str | None, exports: tuple[Path, ...], report: Path | None, as_json: bool) -> None:
    """Compare every export of RUN (default: runs/latest) with the trained model, each in its real engine."""
    _ = find_run, progress
