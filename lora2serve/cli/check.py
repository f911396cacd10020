"""``lora2serve inspect`` and ``lora2serve doctor``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from lora2serve.cli.common import fetch, progress
from lora2serve.errors import EngineError, InputError


@click.command(short_help="Say what a directory is, and verify it.")
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Facts as JSON.")
@click.pass_context
def inspect(ctx: click.Context, path: str, as_json: bool) -> None:
    """Say what PATH is (run, export, adapter or model), verify it, and which targets can serve it, or why not.

    A Hub id is fetched first; `lora2serve pull-check` verifies what was pushed there.
    """
    from lora2serve import console
    from lora2serve.exporting.inspection import inspect as examine

    facts = examine(fetch(path, progress(ctx)))
    problems = facts["problems"]
    if as_json:
        console.result_json(facts)
    else:
        for line in _lines(facts):
            console.result(line)
    if problems:
        raise InputError(f"{path}: {len(problems)} problems\n" + "\n".join(problems), "export again, or fetch it again")


def _lines(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Facts as ``key: value``, deeper ones indented below; what is empty is left out."""
    from lora2serve import console

    for key, value in facts.items():
        if value in (None, [], {}):
            continue
        if key == "bytes":
            yield f"{indent}size: {console.size(value)}"
        elif isinstance(value, Mapping) and "kind" in value:
            yield f"{indent}{key}:"
            yield from _lines({name: fact for name, fact in value.items() if name != "kind"}, indent + "  ")
        elif isinstance(value, Mapping):
            yield f"{indent}{key}: " + ", ".join(_pair(name, fact) for name, fact in value.items())
        elif isinstance(value, list) and any("," in str(item) for item in value):  # sentences
            yield f"{indent}{key}:"
            yield from (f"{indent}  {item}" for item in value)
        else:
            yield f"{indent}{key}: " + (", ".join(map(str, value)) if isinstance(value, list) else _plain(value))


def _pair(name: Any, fact: Any) -> str:
    return f"{name} ×{fact}" if type(fact) is int else f"{name} {_plain(fact)}"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


@click.command(short_help="Show what is here, what is missing, and how to get it.")
@click.option(
    "--fix", is_flag=True, help="Bring into the user's cache what can be: llama.cpp's converter, llm-compressor."
)
@click.option("--json", "as_json", is_flag=True, help="Facts as JSON.")
@click.pass_context
def doctor(ctx: click.Context, fix: bool, as_json: bool) -> None:
    """Show devices, engines and versions, what is missing, and the command that brings it."""
    from dataclasses import asdict

    from lora2serve import console
    from lora2serve.system import doctor as doctors

    failed = doctors.fix(progress(ctx)) if fix else []
    facts = doctors.examine()
    if as_json:
        console.result_json([asdict(fact) for fact in facts])
    width = max(len(fact.what) for fact in facts)
    for fact in [] if as_json else facts:
        console.result(f"{fact.what:<{width}}  {fact.found}" + (f"\n{'':<{width}}  -> {fact.fix}" if fact.fix else ""))
    if failed:
        raise EngineError("\n".join(error.message for error in failed), failed[0].hint)
