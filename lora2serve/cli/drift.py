"""``lora2serve drift``: whether traffic is still like that which a version was promoted on."""

from __future__ import annotations

import click

from lora2serve.cli.options import Command, json_option, progress


@click.command(
    cls=Command,
    short_help="Whether traffic is still like that which the champion was promoted on.",
    examples=[
        ("lora2serve drift medical-qa", "the last 7 days; exit code 3 where something drifted"),
        ("lora2serve drift medical-qa --window 12h --json", ""),
        ("lora2serve drift medical-qa --renew", "what comes now is right: compare with it from now on"),
    ],
)
@click.argument("name")
@click.option("--window", metavar="TIME", default="7d", show_default=True, help="Of both windows: 12h, 7d, 2w.")
@click.option(
    "--folder", metavar="FOLDER", default="gateway", show_default=True, help="Where the gateway keeps its records."
)
@click.option("--report", metavar="FOLDER", help="For report.html and report.json (default: FOLDER/drift/NAME).")
@click.option("--renew", is_flag=True, help="Store the last window as the new reference.")
@json_option
@click.pass_context
def drift(
    ctx: click.Context, name: str, window: str, folder: str, report: str | None, renew: bool, as_json: bool
) -> None:
    """Compare the last requests to NAME's champion with those that it was promoted on, feature by feature.

    Prompts: length, language, unseen word pairs. Answers: length, language, finish reason, refusals, JSON, repetition,
    log-probability. Exit code 3 where one drifted: chance is ruled out, and it is large enough to matter.
    """
    from lora2serve import console
    from lora2serve.gateway.drift.check_drift import drift as check

    made = check(name, window=window, folder=folder, report=report, renew=renew, progress=progress(ctx))
    if as_json:
        console.result_json(made.to_json())
    else:
        for feature in made.features:
            figures = f"effect {feature.effect:+.2f}  p {feature.adjusted:.3g}  PSI {feature.psi:.2f}"
            console.result(f"{feature.feature:18} {'drifted' if feature.drifted else 'same':8} {figures}")
        console.result(made.verdict)
    if made.drifted:
        ctx.exit(3)
