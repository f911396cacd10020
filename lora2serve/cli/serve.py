"""``lora2serve serve``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from lora2serve.cli.common import progress
from lora2serve.errors import UsageError

if TYPE_CHECKING:
    from lora2serve.serving.server import ServeOptions

KINDS = ("command", "compose", "k8s", "production-stack", "kserve", "ray")
EXTRA = "lora2serve.engine_arguments"
PREFERRED = ("vllm", "adapter", "gguf", "ollama", "lmstudio")


class ServeCommand(click.Command):
    """Keeps what stands behind ``--`` for the engine; lets ``--print`` stand before an export."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = args[: args.index("--")] if "--" in args else args
        ctx.meta[EXTRA] = tuple(args[len(own) + 1 :])
        told = []
        for word, after in zip(own, [*own[1:], "-"], strict=False):
            alone = word == "--print" and after not in KINDS and (after.startswith("-") or Path(after).exists())
            told.append("--print=command" if alone else word)
        return super().parse_args(ctx, told)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- ENGINE ARGUMENTS]"]


@click.command(cls=ServeCommand, short_help="Start the engine that an export is for.")
@click.argument("exports", metavar="[EXPORT]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--engine",
    type=click.Choice(["vllm", "llama.cpp", "ollama"]),
    help="Default: the one that the export is for; ollama where one runs.",
)
@click.option("--base", metavar="MODEL", help="Adapters: the base to load (default: the one trained on).")
@click.option("--host", default="127.0.0.1", show_default=True, help="Who may connect; 0.0.0.0 is everybody.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option(
    "--print",
    "printed",
    type=click.Choice(KINDS),
    help="Print instead of running: the command (also without a word), or files for other machines.",
)
@click.option("--tensor-parallel-size", "tensor", type=click.IntRange(min=1), default=1, help="GPUs per layer.")
@click.option("--pipeline-parallel-size", "pipeline", type=click.IntRange(min=1), default=1, help="Groups of layers.")
@click.option(
    "--store",
    metavar="URL",
    default="pvc://models",
    show_default=True,
    help="With --print: where a cluster finds base/ and adapters/; s3://..., gs://... for kserve and ray.",
)
@click.option("--allow-updates", is_flag=True, help="Let clients load and unload adapters: for trusted clients only.")
@click.option("--add", "added", metavar="NAME=DIR", help="Load an adapter export into the server at --url.")
@click.option("--remove", "removed", metavar="NAME", help="Unload an adapter from the server at --url.")
@click.option("--url", default="http://localhost:8000", show_default=True, help="For --add and --remove.")
@click.pass_context
def serve(ctx: click.Context, /, exports: tuple[Path, ...], **options: Any) -> None:
    """Start the engine that EXPORT is for (default: the one of runs/latest) and stay until it ends.

    Several adapter exports, or a bundle of them, share one server, each under its own name.
    """
    from lora2serve import console
    from lora2serve.serving import server, server_process

    told = progress(ctx)
    if options["added"] or options["removed"]:
        _update(options, told)
        return
    if options["engine"] == "ollama":
        _in_ollama(ctx, exports, options, told)
        return
    if options["printed"] not in (None, "command"):
        console.result(_rendered(exports, options, ctx.meta[EXTRA]))
        return
    serving = server.plan(list(exports) or [_default()], _serve_options(options, ctx.meta[EXTRA]))
    if options["printed"]:
        console.result(serving.line)
        return
    if options["allow_updates"]:
        told.warn(
            "clients may load any adapter that lies on this machine: vLLM calls that unsafe for untrusted clients"
        )
    code = server_process.run(serving, told)
    if code:
        ctx.exit(1)


def _in_ollama(ctx: click.Context, exports: tuple[Path, ...], options: dict[str, Any], told: Any) -> None:
    """Ollama runs by itself: the model is made there, and stays."""
    from lora2serve import console
    from lora2serve.artifacts import manifest
    from lora2serve.serving import ollama
    from lora2serve.serving.server import first_question

    given = [key for key in ("host", "port") if ctx.get_parameter_source(key) is ParameterSource.COMMANDLINE]
    if given or ctx.meta[EXTRA]:
        word = f"--{given[0]}" if given else "--"
        raise UsageError(f"--engine ollama with {word}: its server runs already", "OLLAMA_HOST names it")
    if options["printed"] not in (None, "command"):
        raise UsageError(f"--print {options['printed']}: vLLM only", "--print alone prints the command of ollama")
    paths = exports or (_default(("ollama",)),)
    about = manifest.read(paths[0])
    if len(paths) > 1 or not str(about["target"]).startswith("ollama"):
        raise UsageError(
            f"--engine ollama: {len(paths)} exports for {about['target']}, expected one for ollama",
            "`lora2serve export --target ollama` makes one",
        )
    name = str(about["name"])
    if options["printed"]:
        console.result(f"{ollama.command(paths[0], name)} && ollama run {name}")
        return
    client = ollama.Client()
    client.version()
    ollama.create(client, paths[0], name, told)
    told.note(f"{client.address} serves {name}")
    told.note(first_question(client.address, name))


def _rendered(exports: tuple[Path, ...], options: dict[str, Any], extra: tuple[str, ...]) -> str:
    from lora2serve.serving import deploy

    if options["engine"] == "llama.cpp":
        raise UsageError(f"--print {options['printed']}: vLLM only", "--print alone prints the command of llama.cpp")
    spec = deploy.gather(list(exports) or [_default()], _serve_options(options, extra), options["store"])
    return deploy.render(options["printed"], spec).rstrip("\n")


def _serve_options(options: dict[str, Any], extra: tuple[str, ...]) -> ServeOptions:
    from lora2serve.serving.server import ServeOptions

    return ServeOptions(
        options["engine"], options["base"], options["host"], options["port"], options["allow_updates"],
        options["tensor"], options["pipeline"], extra,
    )  # fmt: skip


def _default(wanted: tuple[str, ...] = PREFERRED) -> Path:
    from lora2serve.artifacts import manifest, run

    found = {str(manifest.read(path)["target"]): path for path in reversed(run.latest().list_exports())}
    for target in wanted:
        if target in found:
            return found[target]
    raise UsageError("runs/latest has no export to serve", f"`lora2serve export --target {wanted[0]}` makes one")


def _update(options: dict[str, Any], told: Any) -> None:
    from lora2serve.serving import runtime_lora

    if options["removed"]:
        runtime_lora.remove(options["url"], options["removed"])
        told.note(f"{options['removed']} is gone from {options['url']}")
    if options["added"]:
        name, found, path = options["added"].partition("=")
        if not found or not name or not path:
            raise UsageError(f"--add {options['added']}: expected NAME=DIR")
        copy = runtime_lora.add(options["url"], name, Path(path), runtime_lora.cache())
        told.note(f"{options['url']} serves {name} from {copy}")
