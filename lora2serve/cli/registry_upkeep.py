"""``lora2serve registry promote``, ``rollback`` and what else changes versions that are there, and keeps them whole."""

from __future__ import annotations

from pathlib import Path

import click

from lora2serve.cli.options import Command, dry_run_option, json_option, plain, progress
from lora2serve.cli.registry_output import (
    event_line,
    open_registry,
    plan_option,
    print_changes,
    print_version,
    version_argument,
    why_option,
)  # fmt: skip


@click.command(
    "promote",
    cls=Command,
    short_help="Let an alias point to a version, if its gates are met.",
    examples=[
        ("lora2serve registry promote medical-qa@7", "champion"),
        ("lora2serve registry promote medical-qa@7 --dry-run", "each gate, and what would move"),
        ("lora2serve registry promote medical-qa@7 --to staging --why 'for the clinic'", ""),
    ],
)
@version_argument()
@click.option("--to", "alias", metavar="ALIAS", default="champion", show_default=True, help="Any word.")
@click.option(
    "--gates", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Suites and margins (default: gates.yaml in the registry's folder).",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Go past the gates; --why says why.")
@why_option
@plan_option
@json_option
def promote(version: str, alias: str, gates: Path | None, force: bool, why: str, dry_run: bool, as_json: bool) -> None:
    """Let ALIAS point to a version. Exit code 3 where a gate is not met.

    The gates: the version is active, parity is met for all of its exports, it has the base of the version that ALIAS
    points to now, and is on no suite of the gates worse than that by more than the margin.
    """
    with open_registry() as opened:
        moved = opened.promote(version, alias, why=why, force=force, gates=gates, dry_run=dry_run)
    print_version(moved, as_json)


@click.command(
    "rollback",
    cls=Command,
    short_help="Let an alias point to the version before.",
    examples=[("lora2serve registry rollback medical-qa --why 'wrong doses'", "")],
)
@click.argument("name")
@click.option("--alias", metavar="ALIAS", default="champion", show_default=True, help="Which one.")
@click.option("--to", "number", type=click.IntRange(min=1), metavar="NUMBER", help="That version instead.")
@why_option
@plan_option
@json_option
def rollback(name: str, alias: str, number: int | None, why: str, dry_run: bool, as_json: bool) -> None:
    """Let ALIAS of NAME point to the version that it pointed to before; again, to the one before that."""
    with open_registry() as opened:
        print_version(opened.rollback(name, alias=alias, to=number, why=why, dry_run=dry_run), as_json)


@click.command(
    "unset",
    cls=Command,
    short_help="Remove an alias.",
    examples=[("lora2serve registry unset medical-qa@challenger --why 'the trial is over'", "")],
)
@click.argument("version", metavar="NAME@ALIAS")
@why_option
@plan_option
@json_option
def unset(version: str, why: str, dry_run: bool, as_json: bool) -> None:
    """Remove an alias; the version that it pointed to stays. Prints that version."""
    with open_registry() as opened:
        print_version(opened.unset(version, why=why, dry_run=dry_run), as_json)


@click.command(
    "retire",
    cls=Command,
    short_help="Mark a version as one that must not become live.",
    examples=[("lora2serve registry retire medical-qa@5 --why 'trained on rows that were withdrawn'", "")],
)
@version_argument()
@why_option
@plan_option
@json_option
def retire(version: str, why: str, dry_run: bool, as_json: bool) -> None:
    """Mark a version as one that no alias may point to; its files stay."""
    with open_registry() as opened:
        print_version(opened.retire(version, why=why, dry_run=dry_run), as_json)


@click.command(
    "history",
    cls=Command,
    short_help="What was done, by whom, when and why.",
    examples=[("lora2serve registry history medical-qa", "")],
)
@click.argument("name", required=False)
@json_option
def history(name: str | None, as_json: bool) -> None:
    """List the events of NAME, or all."""
    from lora2serve import console

    with open_registry() as opened:
        events = opened.history(name)
    if as_json:
        console.result_json([event.to_json() for event in events])
        return
    for event in events:
        text = f"{event.at} {event.who} {event_line(event)}"
        console.result(console.printable(text, line_ends=False))  # a reason of two lines is not taken for two events


@click.command(
    "gc",
    cls=Command,
    short_help="Remove the files of old versions.",
    examples=[("lora2serve registry gc --keep 3 --dry-run", "")],
)
@click.option("--keep", type=click.IntRange(min=1), default=5, show_default=True, metavar="N", help="Newest that stay.")
@dry_run_option(help="Print what would be removed.")
@json_option
@click.pass_context
def gc(ctx: click.Context, keep: int, dry_run: bool, as_json: bool) -> None:
    """Remove the files of old versions, and print which; their records stay.

    Never of a version that an alias points to, of the last N that each alias pointed to, or of the N newest of a name.
    """
    from lora2serve import console

    with open_registry() as opened:
        collected = opened.gc(keep=keep, dry_run=dry_run)
    if as_json:
        console.result_json(plain(collected))
        return
    for version in collected.versions:
        console.result(version)
    verb = "would go" if dry_run else "gone"
    progress(ctx).note(f"{collected.files} files, {console.size(collected.bytes)} {verb}")


@click.command(
    "verify",
    cls=Command,
    short_help="Compare everything with what it was.",
    examples=[("lora2serve registry verify", "")],
)
@json_option
@click.pass_context
def verify(ctx: click.Context, as_json: bool) -> None:
    """Compare every file with its sha256, and the aliases with the events. Exit code 1 where something differs."""
    from lora2serve import console

    with open_registry() as opened:
        count = opened.verify(progress=progress(ctx))
    if as_json:
        console.result_json({"versions": count})
    else:
        progress(ctx).note(f"{count} versions are whole")


@click.command(
    "sync",
    cls=Command,
    short_help="Send versions to the Hub or to MLflow.",
    examples=[
        ("lora2serve registry sync medical-qa --to hub:you/medical-qa", ""),
        ("lora2serve registry sync medical-qa --to mlflow:http://localhost:5000", ""),
        ("lora2serve registry sync medical-qa --to hub:you/medical-qa --dry-run", "what would be sent"),
    ],
)
@click.argument("name")
@click.option("--to", required=True, metavar="PLACE", help="hub:USER/REPO or mlflow:http://HOST:PORT.")
@dry_run_option(help="Print what would be changed there; send nothing.")
@json_option
@click.pass_context
def sync(ctx: click.Context, name: str, to: str, dry_run: bool, as_json: bool) -> None:
    """Send the proven versions of NAME, one way, and print what was sent; what is there already is not sent again.

    On the Hub version 7 is the tag v7, and each alias a branch of its name. In MLflow each is a version of the
    registered model NAME whose tag lora2serve.version says which, with its scores as metrics; aliases are aliases.
    """
    from lora2serve import console

    with open_registry() as opened:
        synced = opened.sync(name, to=to, dry_run=dry_run, progress=progress(ctx))
    for line in synced.left_out:
        progress(ctx).note(f"not sent: {line}")
    if as_json:
        console.result_json(plain(synced))
        return
    if dry_run:
        print_changes(synced.changes)
        return
    for reference in (*synced.pushed, *synced.moved):
        console.result(reference)
