"""``lora2serve adapters``: those of a running server."""

from __future__ import annotations

import click

from lora2serve.cli.options import Command, CommandGroup, complete_exports, json_option, plain, progress
from lora2serve.errors import UsageError

url_option = click.option("--url", default="http://localhost:8000", show_default=True, help="The server.")


@click.group(cls=CommandGroup, short_help="List, load and unload the adapters of a running server.")
def adapters() -> None:
    """The adapters of a running vLLM, which was started with `lora2serve serve --allow-updates`."""


@adapters.command("list", cls=Command, short_help="List them.", examples=[("lora2serve adapters list", "")])
@url_option
@json_option
def list_adapters(url: str, as_json: bool) -> None:
    """Print the names of the adapters that the server has."""
    from lora2serve import console
    from lora2serve.api import served_adapters

    served = served_adapters.list_adapters(url)
    if as_json:
        console.result_json(plain(served))
        return
    for adapter in served:
        console.result(adapter.name)


@adapters.command(
    "add", cls=Command, short_help="Load one.",
    examples=[("lora2serve adapters add towns=runs/towns/exports/adapter", "")],
)  # fmt: skip
@click.argument("adapter", metavar="NAME=DIR", shell_complete=complete_exports)
@url_option
@click.pass_context
def add_adapter(ctx: click.Context, adapter: str, url: str) -> None:
    """Load the adapter export DIR into the server as NAME. Its files are checked, and copied to where they stay."""
    from lora2serve.api import served_adapters
    from lora2serve.system.http import without_credentials

    name, _, path = adapter.partition("=")
    if not name or not path:
        raise UsageError(f"{adapter}: expected NAME=DIR", "such as towns=runs/towns/exports/adapter")
    copy = served_adapters.add_adapter(name, path, url)
    progress(ctx).note(f"{without_credentials(url)} serves {name} from {copy}")


@adapters.command("remove", cls=Command, short_help="Unload one.", examples=[("lora2serve adapters remove towns", "")])
@click.argument("name")
@url_option
@click.pass_context
def remove_adapter(ctx: click.Context, name: str, url: str) -> None:
    """Unload the adapter NAME from the server."""
    from lora2serve.api import served_adapters
    from lora2serve.system.http import without_credentials

    served_adapters.remove_adapter(name, url)
    progress(ctx).note(f"{without_credentials(url)} no longer serves {name}")
