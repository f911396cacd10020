"""``lora2serve gateway``."""

from __future__ import annotations

from pathlib import Path

import click

from lora2serve.cli.options import Choice, Command, progress


@click.command(
    cls=Command,
    short_help="Stand in front of servers: aliases to versions, trials, records, metrics.",
    examples=[
        ("lora2serve gateway --upstream prod=http://localhost:8000", "in front of one vLLM"),
        ("lora2serve gateway --upstream prod=http://a:8000 --upstream staging=http://b:8000", ""),
        ("lora2serve gateway gateway.yaml --host 0.0.0.0 --port 9000", ""),
        ("lora2serve gateway --print prometheus-rules > rules.yaml", "alerts for its metrics"),
    ],
)
@click.argument("config", metavar="[gateway.yaml]", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--upstream", "upstreams", metavar="NAME=URL", multiple=True,
    help="A server of OpenAI's API; the first gets what is for no version of the registry.",
)  # fmt: skip
@click.option(
    "--registry", metavar="FOLDER|URL",
    help="Whose aliases are routes (default: LORA2SERVE_REGISTRY, else registry/).",
)  # fmt: skip
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 lets any machine connect."
)
@click.option("--port", type=click.IntRange(1, 65535), default=9000, show_default=True, help="Port to listen on.")
@click.option(
    "--print", "printed", type=Choice(["grafana", "prometheus-rules"]),
    help="Print a dashboard or alerts for the metrics instead of running it.",
)  # fmt: skip
@click.pass_context
def gateway(
    ctx: click.Context, config: Path | None, upstreams: tuple[str, ...], registry: str | None, host: str, port: int,
    printed: str | None,
) -> None:  # fmt: skip
    """Answer for the names of the registry: a request for NAME goes to the version that NAME@champion points to.

    It goes on until Ctrl-C or SIGTERM, and completes the answers under way before it ends. A gateway.yaml that lies
    here is read; docs/gateway.md has its keys.
    """
    from lora2serve import console
    from lora2serve.gateway.monitoring import alert_rules, grafana_dashboard
    from lora2serve.gateway.run_gateway import run_gateway

    if printed:
        text = grafana_dashboard.grafana_dashboard() if printed == "grafana" else alert_rules.alert_rules()
        console.result(text.rstrip("\n"))
        return
    run_gateway(config, upstreams, registry, host, port, progress(ctx))
