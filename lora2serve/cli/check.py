"""``lora2serve inspect`` and ``lora2serve doctor``."""

from __future__ import annotations

from pathlib import Path

import click

from lora2serve.cli.common import progress
from lora2serve.errors import InputError


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Facts as JSON.")
def inspect(path: Path, as_json: bool) -> None:
    """Say what PATH is (run, export, adapter or model), verify it, and which targets can serve it, or why not."""
    from lora2serve import console
    from lora2serve.inspect import inspect as examine

    facts = examine(path)
    problems = facts["problems"]
    if as_json:
        console.result_json(facts)
    else:
        for key, value in facts.items():
            if value not in (None, [], {}):
                console.result(f"{key}: {value}")
    if problems:
        raise InputError(f"{path}: {len(problems)} problems\n" + "\n".join(problems), "export again, or fetch it again")


@click.command()
@click.option("--fix", is_flag=True, help="Fetch what can be fetched into the user's cache: llama.cpp's converter.")
@click.option("--json", "as_json", is_flag=True, help="Facts as JSON.")
@click.pass_context
def doctor(ctx: click.Context, fix: bool, as_json: bool) -> None:
    """Show devices, engines and versions, what is missing, and the command that brings it."""
    from dataclasses import asdict

    from lora2serve import console
    from lora2serve import doctor as doctors

    if fix:
        doctors.unpack_source_package(progress(ctx))
    facts = doctors.examine()
    if as_json:
        console.result_json([asdict(fact) for fact in facts])
        return
    for fact in facts:
        console.result(f"{fact.what}: {fact.found}" + (f"\n    {fact.fix}" if fact.fix else ""))
