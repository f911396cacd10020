"""What the commands of ``lora2serve registry`` share: the registry, their arguments, how a version is printed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from lora2serve.cli.options import F

if TYPE_CHECKING:
    from lora2serve.api.version_registry import Registry
    from lora2serve.registry.version_record import Version, VersionScore

REFERENCES = """
    SELECT name, number, '' AS alias FROM version UNION ALL SELECT name, number, alias FROM alias
    ORDER BY name, number, alias
"""


def open_registry() -> Registry:
    """The one that is named by the environment, or lies here."""
    from lora2serve.api.version_registry import Registry

    return Registry()


def complete_versions(ctx: click.Context, parameter: click.Parameter, word: str) -> list[CompletionItem]:
    """Versions and aliases of the registry that begin with ``word``."""
    from lora2serve.errors import Lora2ServeError

    try:
        with open_registry() as registry:
            _, rows = registry.sql(REFERENCES)
    except Lora2ServeError:
        return []
    known = [f"{name}@{alias or number}" for name, number, alias in rows]
    return [CompletionItem(name) for name in known if name.startswith(word)]


def version_argument(name: str = "version") -> Callable[[F], F]:
    """``NAME@VERSION``"""
    return click.argument(name, metavar="NAME@VERSION", shell_complete=complete_versions)


why_option = click.option("--why", metavar="TEXT", default="", help="The reason, for the history.")


def print_version(version: Version, as_json: bool) -> None:
    """Its name, or all of it as JSON."""
    from lora2serve import console

    if as_json:
        console.result_json(version.to_json())
    else:
        console.result(version.reference)


def print_versions(
    versions: list[Version], as_json: bool, score_of: Callable[[Version], VersionScore | None] | None = None
) -> None:
    """A line each with the score that was asked for, or all of them as JSON."""
    from lora2serve import console

    if as_json:
        console.result_json([version.to_json() for version in versions])
        return
    for version in versions:
        words = [version.reference, *version.aliases]
        words += [version.state] if version.state != "active" else []
        found = score_of(version) if score_of else None
        words += [f"{found.name}={found.value:g}"] if found else []
        words += [f"rank={version.rank}"] if version.rank else []
        text = " ".join([*words, version.base, version.created[:10], version.author])
        console.result(console.printable(text, line_ends=False))  # what a run calls its base is text of anybody's


def data_source(source: object) -> str:
    """Rows that were trained on, in one line."""
    if not isinstance(source, dict):
        return str(source)
    return f"{source.get('path', '')}, {source.get('rows', 0)} rows, sha256 {str(source.get('sha256') or '-')[:12]}"


def shown(value: object) -> str:
    """A value in a line of others."""
    return "-" if value is None else str(value)
