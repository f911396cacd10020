"""``lora2serve deploy``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora2serve.cli.options import ENGINE_ARGUMENTS, EngineCommand, exports_argument, names, server_options
from lora2serve.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from lora2serve.serving.deploy import DeployKind

KINDS = ("compose", "k8s", "production-stack", "kserve", "ray", "llm-d", "argo", "litellm")
STORE = "pvc://models"


class Kind(click.Choice[str]):
    """A kind of deployment: a mistyped one is answered with the nearest."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in KINDS:
            raise UsageError(
                f"deploy {value}: unknown kind{did_you_mean(value, KINDS)}", f"known kinds: {', '.join(KINDS)}"
            )
        return value


def read_weights(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...]:
    """Whole numbers with commas between."""
    weights = names(ctx, parameter, text)
    if wrong := next((weight for weight in weights if not weight.isdecimal() or len(weight) > 9), None):
        raise UsageError(f"--weights {wrong}: expected whole numbers", "such as --weights 90,10")
    return tuple(map(int, weights))


@click.command(
    cls=EngineCommand,
    short_help="Print what another machine needs to serve an export.",
    examples=[
        ("lora2serve deploy compose > compose.yaml", "an export of runs/latest"),
        ("lora2serve deploy k8s bundle --store pvc://models > k8s.yaml", ""),
        ("lora2serve deploy ray bundle --store s3://bucket/models -- --max-model-len 8192", ""),
        ("lora2serve deploy llm-d towns@champion towns@staging --weights 90,10 --pool vllm", "a route to two versions"),
    ],
)
@click.argument("kind", type=Kind(KINDS))
@exports_argument
@server_options
@click.option(
    "--store", metavar="URL", default=STORE, show_default=True,
    help="Where a cluster finds base/ and adapters/; s3://..., gs://... for kserve and ray.",
)  # fmt: skip
@click.option(
    "--weights", metavar="N,N", callback=read_weights,
    help="How often each version answers for their name: kserve (a server for each), llm-d, litellm.",
)  # fmt: skip
@click.option("--pool", metavar="NAME", default="", help="llm-d: the InferencePool that serves the versions.")
@click.option("--upstream", metavar="URL", default="", help="litellm: the vLLM that serves the versions.")
@click.pass_context
def deploy(
    ctx: click.Context, /, kind: DeployKind, exports: tuple[Path, ...], base: str | None, host: str,
    port: int, tensor_parallel_size: int, pipeline_parallel_size: int, store: str, weights: tuple[int, ...], pool: str,
    upstream: str,
) -> None:  # fmt: skip
    """Print the YAML of a vLLM server for EXPORT (default: one of runs/latest) on other machines.

    KIND is compose (Docker), k8s (plain Kubernetes), production-stack, kserve or ray. Or it is a route to versions of
    the registry, which are served as NAME-7: llm-d and litellm split what asks for NAME over them, argo is an analysis
    that ends with the verdict of the gateway's trial. `lora2serve deploy train` prints the job of a
    training instead.
    """
    from lora2serve import console
    from lora2serve.api import deploy_server

    text = deploy_server.deploy(
        kind, exports, base=base, host=host, port=port, tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size, store=store, engine_arguments=ctx.meta[ENGINE_ARGUMENTS],
        weights=weights, pool=pool, upstream=upstream,
    )  # fmt: skip
    console.result(text)
