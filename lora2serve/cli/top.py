"""``lora2serve top``: what a gateway does, in the terminal."""

from __future__ import annotations

import click

from lora2serve.cli.options import Command


@click.command(
    cls=Command,
    short_help="What a running gateway does, as a table.",
    examples=[
        ("lora2serve top", "the gateway at http://localhost:9000, until Ctrl-C"),
        ("lora2serve top --url http://gateway:9000 --once", "one table, of all since it began"),
    ],
)
@click.option(
    "--url", metavar="URL", default="http://localhost:9000", show_default=True, help="Address of the gateway."
)
@click.option(
    "--every", type=click.FloatRange(min=0.2, max=3600), default=2.0, show_default=True, help="Seconds between tables."
)
@click.option("--once", is_flag=True, help="One table, and end; so does a pipe.")
def top(url: str, every: float, once: bool) -> None:
    """Show requests, failures, times, tokens, right answers and trials of each version, from the gateway's /metrics."""
    from lora2serve import console
    from lora2serve.gateway.monitoring.live_table import HEADS, plain_lines, watch

    views = watch(url, every)
    if once or not console.LiveTable.fits():
        for line in plain_lines(next(views)):
            console.result(line)
        return
    with console.LiveTable(HEADS) as shown:
        try:
            for view in views:
                shown.show(view.title, view.rows, view.notes)
        except KeyboardInterrupt:
            return  # the way to end it
