"""``lora2serve doctor``."""

from __future__ import annotations

import click

from lora2serve.cli.options import Command, json_option, plain, progress
from lora2serve.errors import EngineError


@click.command(
    cls=Command,
    short_help="Show what is installed, what is missing, and how to install it.",
    examples=[("lora2serve doctor", ""), ("lora2serve doctor --fix", "llama.cpp's converter, llm-compressor")],
)
@click.option("--fix", is_flag=True, help="Install llama.cpp's converter and llm-compressor into the user's cache.")
@json_option
@click.pass_context
def doctor(ctx: click.Context, fix: bool, as_json: bool) -> None:
    """Show devices, engines and versions, what is missing, and the command that installs it."""
    from lora2serve import console
    from lora2serve.system import doctor as doctors

    failed = doctors.fix(progress(ctx)) if fix else []
    facts = doctors.examine()
    if as_json:
        console.result_json(plain(facts))
    width = max(len(fact.label) for fact in facts)
    for fact in [] if as_json else facts:
        fix_line = f"\n{'':<{width}}  -> {fact.fix}" if fact.fix else ""
        console.result(f"{fact.label:<{width}}  {fact.value}{fix_line}")
    if failed:
        raise EngineError("\n".join(error.message for error in failed), failed[0].hint)
