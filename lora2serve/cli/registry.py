"""``lora2serve registry``: versions of adapters, their aliases and their history."""

from __future__ import annotations

from pathlib import Path

import click

from lora2serve.cli.options import Command, CommandGroup, complete_exports, json_option, plain, progress
from lora2serve.cli.registry_output import (
    data_source,
    open_registry,
    plan_option,
    print_version,
    print_versions,
    shown,
    version_argument,
)  # fmt: skip
from lora2serve.cli.registry_upkeep import gc, history, promote, retire, rollback, sync, unset, verify


@click.group(
    cls=CommandGroup,
    short_help="Versions of adapters: who trained what on what, which is live, which was best.",
    epilog="Where any command takes a run, an adapter or an export, it takes NAME@7, NAME@champion and "
    "NAME@champion/vllm. LORA2SERVE_REGISTRY names another registry than the folder registry/ here: a folder, or "
    "postgresql://HOST/DATABASE.",
)
def registry() -> None:
    """Versions of adapters and of their exports. A version never changes; aliases such as champion move."""


@registry.command(
    "add",
    cls=Command,
    short_help="Register a run, an adapter or an export.",
    examples=[
        ("lora2serve registry add runs/latest --name medical-qa --domain medical", ""),
        ("lora2serve registry add runs/latest --name medical-qa --dry-run", "a new version, or one that is there"),
    ],
)
@click.argument("source", metavar="RUN|ADAPTER|EXPORT", shell_complete=complete_exports)
@click.option("--name", required=True, metavar="NAME", help="What its versions are called.")
@click.option("--domain", metavar="DOMAIN", default="", help="What it is about, such as medical.")
@click.option("--task", metavar="TASK", default="", help="What it does, such as qa.")
@click.option("--note", metavar="TEXT", default="", help="Anything else.")
@click.option("--author", metavar="PERSON", default="", help="Who trained it (default: you).")
@click.option("--unproven", is_flag=True, help="Also what parity has not met, or has not looked at.")
@plan_option
@json_option
@click.pass_context
def add(
    ctx: click.Context, /, source: str, name: str, domain: str, task: str, note: str, author: str, unproven: bool,
    dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Register a run with its exports, an adapter, or an export, and print its version.

    The same content is the same version: adding it again adds the exports and scores that are new. Exit code 3 where
    parity is not met.
    """
    from lora2serve import console

    with open_registry() as opened:
        version = opened.add(
            source, name=name, domain=domain, task=task, note=note, author=author, unproven=unproven,
            dry_run=dry_run, progress=progress(ctx),
        )  # fmt: skip
    if dry_run and not as_json:
        console.result(f"{version.reference}: {'a new version' if version.is_new else 'there already'}")
    print_version(version, as_json)


@registry.command(
    "init",
    cls=Command,
    short_help="Make an empty registry, for a team.",
    examples=[("lora2serve registry init --content s3://bucket/models", "of a Postgres in LORA2SERVE_REGISTRY")],
)
@click.option("--content", metavar="FOLDER|URL", default="", help="Where files lie (default: the registry's folder).")
@json_option
def init(content: str, as_json: bool) -> None:
    """Make the registry that LORA2SERVE_REGISTRY names; where it is there, nothing happens."""
    from lora2serve import console
    from lora2serve.api.version_registry import Registry

    with Registry.create(content=content) as opened:
        place = opened.location.shown
    if as_json:
        console.result_json({"registry": place})
    else:
        console.result(place)


@registry.command(
    "list",
    cls=Command,
    short_help="Names and their versions.",
    examples=[("lora2serve registry list", ""), ("lora2serve registry list medical-qa --json", "")],
)
@click.argument("name", required=False)
@json_option
def list_versions(name: str | None, as_json: bool) -> None:
    """List all versions, or those of NAME."""
    with open_registry() as opened:
        print_versions(opened.versions(name), as_json)


@registry.command(
    "show",
    cls=Command,
    short_help="All that is known of a version.",
    examples=[("lora2serve registry show medical-qa@champion", "")],
)
@version_argument()
@json_option
def show(version: str, as_json: bool) -> None:
    """Show what a version was made from and with, its exports, scores and aliases."""
    from lora2serve import console

    with open_registry() as opened:
        found = opened.get(version)
    if as_json:
        console.result_json(found.to_json())
        return
    for key, value in found.to_json().items():
        if key in ("exports", "scores", "recipe", "data", "versions") or value in (None, "", [], {}):
            continue
        console.result(f"{key:14} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    for kind, source in found.data.items():
        console.result(f"{kind + ' data':14} {data_source(source)}")
    for export in found.exports:
        console.result(f"{'export':14} {export.name}, {console.size(export.bytes)}: {export.unproven or 'parity met'}")
    for score in found.scores:
        interval = f" [{score.low:g}, {score.high:g}]" if score.low is not None and score.high is not None else ""
        console.result(f"{'score':14} {score.name} {score.value:g}{interval}, {score.created}")


@registry.command(
    "diff",
    cls=Command,
    short_help="In what two versions differ.",
    examples=[("lora2serve registry diff medical-qa@6 medical-qa@champion", "")],
)
@version_argument("first")
@version_argument("second")
@json_option
def diff(first: str, second: str, as_json: bool) -> None:
    """Print every field that differs: recipe, data, scores, exports."""
    from lora2serve import console

    with open_registry() as opened:
        found = opened.diff(first, second)
    if as_json:
        console.result_json(plain(found))
        return
    for difference in found:
        console.result(f"{difference.field}: {shown(difference.first)} -> {shown(difference.second)}")


@registry.command(
    "find",
    cls=Command,
    short_help="Which version was best at what, and when.",
    examples=[
        ("lora2serve registry find --domain medical --metric medqa.acc --last quarter --best", ""),
        ("lora2serve registry find --where 'rank <= 16 and base = org/model'", ""),
        ("lora2serve registry find --alias champion", "what is live"),
    ],
)
@click.option("--name", metavar="NAME", default="", help="Versions of that name.")
@click.option("--domain", metavar="DOMAIN", default="", help="Of that domain.")
@click.option("--task", metavar="TASK", default="", help="Of that task.")
@click.option("--author", metavar="PERSON", default="", help="By that person.")
@click.option("--alias", metavar="ALIAS", default="", help="That this alias points to.")
@click.option("--data", metavar="FILE|SHA256", default="", help="Trained on these rows.")
@click.option("--metric", metavar="SUITE.METRIC", default="", help="Measured on that; the best come first.")
@click.option("--suite", metavar="SHA256", default="", help="The beginning of its sha256, where suites share a name.")
@click.option("--last", metavar="PERIOD", default="", help="The last whole day, week, month, quarter or year; or 30d.")
@click.option("--since", metavar="DATE", default="", help="From that date on: measured, with --metric; else trained.")
@click.option("--until", metavar="DATE", default="", help="Before that date.")
@click.option("--where", metavar="CONDITION", default="", help="Such as 'rank <= 16 and medqa.acc >= 0.7'.")
@click.option("--best", is_flag=True, help="The best alone.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="N at most.")
@json_option
@click.pass_context
def find(ctx: click.Context, /, *, as_json: bool, **question: str) -> None:
    """Print the versions for which all of that holds."""
    from lora2serve.registry.periods import period

    with open_registry() as opened:
        found = opened.find(**question)  # type: ignore[arg-type]
        if not found:
            words = {key: question[key] for key in ("name", "domain", "task", "author", "alias")}
            progress(ctx).note("\n".join(opened.unknown_words(**words)) or "no version fits")
    measured = period(question["since"], question["until"], question["last"])
    print_versions(
        found, as_json, lambda version: version.score(question["metric"], question["suite"].lower(), *measured)
    )


@registry.command(
    "sql",
    cls=Command,
    short_help="Ask by SQL, read-only.",
    examples=[("lora2serve registry sql 'SELECT author, count(*) FROM version GROUP BY author'", "")],
)
@click.argument("query", metavar="SELECT")
@json_option
def sql(query: str, as_json: bool) -> None:
    """Print the rows of a SELECT, columns apart by tabs; docs/registry.md has the tables."""
    from lora2serve import console
    from lora2serve.errors import UsageError

    with open_registry() as opened:
        columns, rows = opened.sql(query)
    if as_json:
        if twice := sorted({name for name in columns if columns.count(name) > 1}):
            raise UsageError(f"sql: several columns are called {', '.join(twice)}", "AS gives each a name of its own")
        console.result_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    for row in (columns, *rows):
        console.result("\t".join(shown(value) for value in row))


@registry.command(
    "score",
    cls=Command,
    short_help="Write down what a version reached on a suite.",
    examples=[("lora2serve registry score medical-qa@7 medqa.json", "")],
)
@version_argument()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@json_option
def score(version: str, file: Path, as_json: bool) -> None:
    """Write down the scores in FILE: {"format": 1, "suite", "suite_sha256", "engine", "created", "metrics"}."""
    with open_registry() as opened:
        print_version(opened.score(version, file), as_json)


for command in (promote, rollback, unset, retire, history, gc, verify, sync):
    registry.add_command(command)
