"""``lora2serve serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora2serve.cli.common import progress
from lora2serve.errors import UsageError

PREFERRED = ("vllm", "adapter", "gguf", "ollama", "lmstudio")


@click.command()
@click.argument("exports", metavar="[EXPORT]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--engine", type=click.Choice(["vllm", "llama.cpp"]), help="Default: the one that the export is for.")
@click.option("--base", metavar="MODEL", help="Adapters: the base to load (default: the one trained on).")
@click.option("--host", default="127.0.0.1", show_default=True, help="Who may connect; 0.0.0.0 is everybody.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--print", "print_only", is_flag=True, help="Print the command instead of running it.")
@click.option("--allow-updates", is_flag=True, help="Let clients load and unload adapters: for trusted clients only.")
@click.option("--add", "added", metavar="NAME=DIR", help="Load an adapter export into the server at --url.")
@click.option("--remove", "removed", metavar="NAME", help="Unload an adapter from the server at --url.")
@click.option("--url", default="http://localhost:8000", show_default=True, help="For --add and --remove.")
@click.pass_context
def serve(ctx: click.Context, /, exports: tuple[Path, ...], **options: Any) -> None:
    """Start the engine that EXPORT is for (default: the one of runs/latest) and stay until it ends.

    Several adapter exports share one server, each under its own name.
    """
    from lora2serve import console, serve

    told = progress(ctx)
    if options["added"] or options["removed"]:
        _update(options, told)
        return
    serving = serve.plan(
        list(exports) or [_default()], base=options["base"], engine=options["engine"], host=options["host"],
        port=options["port"], updating=options["allow_updates"],
    )  # fmt: skip
    if options["print_only"]:
        console.result(serving.line)
        return
    if options["allow_updates"]:
        told.warn(
            "clients may load any adapter that lies on this machine: vLLM calls that unsafe for untrusted clients"
        )
    code = serve.run(serving, told)
    if code:
        ctx.exit(1)


def _default() -> Path:
    from lora2serve import manifest, run

    found = {str(manifest.read(path)["target"]): path for path in reversed(run.latest().list_exports())}
    for target in PREFERRED:
        if target in found:
            return found[target]
    raise UsageError("runs/latest has no export to serve", "`lora2serve export --target vllm` makes one")


def _update(options: dict[str, Any], told: Any) -> None:
    from lora2serve import serve

    if options["removed"]:
        serve.remove(options["url"], options["removed"])
        told.note(f"{options['removed']} is gone from {options['url']}")
    if options["added"]:
        name, found, path = options["added"].partition("=")
        if not found or not name or not path:
            raise UsageError(f"--add {options['added']}: expected NAME=DIR")
        copy = serve.add(options["url"], name, Path(path), Path("~/.cache/lora2serve/adapters").expanduser())
        told.note(f"{options['url']} serves {name} from {copy}")
