"""``lora2serve serve``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora2serve.cli.adapters import add_adapter, remove_adapter
from lora2serve.cli.deploy import KINDS, STORE, deploy
from lora2serve.cli.options import (
    ENGINE_ARGUMENTS,
    Choice,
    EngineCommand,
    dry_run_option,
    exports_argument,
    progress,
    renamed,
    server_options,
)  # fmt: skip
from lora2serve.errors import UsageError

if TYPE_CHECKING:
    from lora2serve.api.serve_model import Engine

FORMER_KINDS = KINDS[:5]  # of --print


class ServeCommand(EngineCommand):
    """Lets the former ``--print`` stand before an export, without a kind."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = args[: args.index("--")] if "--" in args else args
        words = []
        for word, following in zip(own, [*own[1:], "-"], strict=False):
            kind = following in ("command", *FORMER_KINDS)
            alone = not kind and (following.startswith("-") or Path(following).exists())
            words.append("--print=command" if word == "--print" and alone else word)
        return super().parse_args(ctx, [*words, *args[len(own) :]])


@click.command(
    cls=ServeCommand,
    short_help="Start the engine that an export is for.",
    examples=[
        ("lora2serve serve", "an export of runs/latest, at http://localhost:8000"),
        ("lora2serve serve runs/demo/exports/vllm --port 9000", ""),
        ("lora2serve serve bundle -- --max-loras 4", "an argument for vLLM"),
        (
            "lora2serve serve medical-qa@champion/adapter --allow-updates",
            "room for its registry",
        ),
        ("lora2serve serve --engine ollama", "create it in the Ollama that runs"),
        ("lora2serve serve runs/a runs/b --engine peft", "kinds of adapters that no other engine knows"),
        ("lora2serve serve --dry-run", "print the command instead"),
    ],
)
@exports_argument
@click.option(
    "--engine", type=Choice(["vllm", "llama.cpp", "ollama", "peft"]),
    help="Default: the one that the export is for; ollama where one runs; peft: runs and adapters of any kind.",
)  # fmt: skip
@server_options
@click.option("--allow-updates", is_flag=True, help="Let clients load and unload adapters: for trusted clients only.")
@click.option(
    "--trust-export", is_flag=True,
    help="Pass the export's serve.yaml to vLLM as it is. Without it, only what `export` writes.",
)  # fmt: skip
@dry_run_option(help="Print the command instead of running it.")
@click.option("--print", "printed", type=Choice(["command", *FORMER_KINDS]), hidden=True)
@click.option("--store", default=STORE, hidden=True)
@click.option("--add", "added", hidden=True)
@click.option("--remove", "removed", hidden=True)
@click.option("--url", default="http://localhost:8000", hidden=True)
@click.pass_context
def serve(
    ctx: click.Context, /, exports: tuple[Path, ...], engine: Engine | None, base: str | None, host: str,
    port: int, tensor_parallel_size: int, pipeline_parallel_size: int, allow_updates: bool, trust_export: bool,
    dry_run: bool,
    printed: str | None, store: str, added: str | None, removed: str | None, url: str,
) -> None:  # fmt: skip
    """Start the engine that EXPORT is for (default: one of runs/latest), and stay until it ends.

    Several adapter exports, or a bundle of them, share one server, each under its own name. With --engine peft,
    EXPORT is a run or an adapter.
    """
    from lora2serve import console
    from lora2serve.api import serve_model
    from lora2serve.serving.server import ServeOptions

    if added or removed:
        _former_updates(ctx, added, removed, url)
        return
    options = ServeOptions(
        engine, base, host, port, allow_updates, tensor_parallel_size, pipeline_parallel_size,
        ctx.meta[ENGINE_ARGUMENTS], trust_export,
    )  # fmt: skip
    if printed:
        new = "serve --dry-run" if printed == "command" else f"deploy {printed}"
        renamed(ctx, "serve --print" if printed == "command" else f"serve --print {printed}", new)
    if printed in FORMER_KINDS:
        if engine not in (None, "vllm"):
            raise UsageError(f"--print {printed}: vLLM only", f"--print alone prints the command of {engine}")
        ctx.invoke(
            deploy, kind=printed, exports=exports, base=base, host=host, port=port, store=store, weights=(),
            tensor_parallel_size=tensor_parallel_size, pipeline_parallel_size=pipeline_parallel_size,
        )  # fmt: skip
    elif printed or dry_run:
        console.result(serve_model.serving_command(exports, options, progress(ctx)))
    elif serve_model.serve_until_stopped(exports, options, progress(ctx)):
        ctx.exit(1)


def _former_updates(ctx: click.Context, added: str | None, removed: str | None, url: str) -> None:
    """``serve --add`` and ``serve --remove``."""
    if removed:
        renamed(ctx, "serve --remove", "adapters remove")
        ctx.invoke(remove_adapter, name=removed, url=url)
    if added:
        renamed(ctx, "serve --add", "adapters add")
        ctx.invoke(add_adapter, adapter=added, url=url)
