"""What the commands of ``lora2serve registry`` share: the registry, their arguments, how a version is printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from lora2serve.cli.options import F, dry_run_option, progress

if TYPE_CHECKING:
    from lora2serve.api.version_registry import Registry
    from lora2serve.registry.version_record import ChangedVersion, RegistryEvent, Version, VersionScore

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
plan_option = dry_run_option(help="Print what would change; change nothing.")


def print_version(version: Version, as_json: bool) -> None:
    """Its name, or all of it as JSON; of a dry run, what would change, too."""
    from lora2serve import console
    from lora2serve.registry.version_record import ChangedVersion

    if isinstance(version, ChangedVersion) and not version.dry_run:
        version = version.version
    if as_json:
        console.result_json(version.to_json())
    elif isinstance(version, ChangedVersion):
        _print_plan(version)
    else:
        console.result(version.reference)


def print_changes(lines: Sequence[str]) -> None:
    """What a dry run would change, a line each; where that is nothing, a note says so."""
    from lora2serve import console

    for line in lines:
        console.result(console.printable(line, line_ends=False))
    note = "dry run: nothing was changed" if lines else "nothing would change"
    progress(click.get_current_context()).note(note)


def event_line(event: RegistryEvent) -> str:
    """What was done to what, and why."""
    target = f"{event.name}@{event.alias}" if event.alias else f"{event.name}@{event.new}"
    moved = f" {shown(event.old)} -> {shown(event.new)}" if event.alias else ""
    reason = f": {event.why}" if event.why else ""
    past = f" (past {event.overridden})" if event.overridden else ""
    return f"{event.kind} {target}{moved}{reason}{past}"


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


def _print_plan(version: ChangedVersion) -> None:
    from lora2serve import console

    for gate in version.gates:
        line = f"gate {gate.gate}: {'met' if gate.met else 'not met'}: {gate.reason}"
        console.result(console.printable(line, line_ends=False))
    lines = [event_line(event) for event in version.events]
    print_changes([*lines, f"store {version.reference}: {len(version.files)} files"] if version.files else lines)


def data_source(source: object) -> str:
    """Rows that were trained on, in one line."""
    if not isinstance(source, dict):
        return str(source)
    return f"{source.get('path', '')}, {source.get('rows', 0)} rows, sha256 {str(source.get('sha256') or '-')[:12]}"


def shown(value: object) -> str:
    """A value in a line of others."""
    return "-" if value is None else str(value)
