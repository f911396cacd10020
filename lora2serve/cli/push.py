"""``lora2serve push`` and ``lora2serve pull-check``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora2serve.cli.common import progress
from lora2serve.errors import ParityNotMet

if TYPE_CHECKING:
    from lora2serve.artifacts.run import Run
    from lora2serve.hub import PushResult
    from lora2serve.progress import Progress


@click.command(short_help="Push exports to the Hugging Face Hub.")
@click.argument("exports", metavar="[EXPORT]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--repo-id", required=True, metavar="USER/NAME", help="Where to; -lora and -GGUF are appended by convention."
)
@click.option("--private", is_flag=True, help="Make new repositories private; refuse a public one.")
@click.option("--revision", metavar="BRANCH", help="Push to this branch, made if it is not there (default: main).")
@click.option("--create-pr", is_flag=True, help="Leave it as a pull request.")
@click.option("--single-repo", is_flag=True, help="Everything into one repository.")
@click.option("--allow-unproven", is_flag=True, help="Push exports whose parity is not proven; the card says so.")
@click.option("--dry-run", is_flag=True, help="Show the files and the card; send nothing.")
@click.option("--json", "as_json", is_flag=True, help="Results as JSON.")
@click.pass_context
def push(ctx: click.Context, /, exports: tuple[Path, ...], repo_id: str, as_json: bool, **options: Any) -> None:
    """Push EXPORTs (default: all of runs/latest) to the Hugging Face Hub, card included.

    The token is the one of `hf auth login` or HF_TOKEN. Prints the repositories' addresses.
    """
    from lora2serve import console, hub
    from lora2serve.artifacts import run as runs

    chosen, run = list(exports), _run_of(exports)
    if not chosen:
        run = runs.latest()
        chosen = hub.choose(run.list_exports(), progress(ctx))
    pushed = hub.push(chosen, repo_id=repo_id, run=run, progress=progress(ctx), **options)
    if as_json:
        console.result_json([asdict(one) for one in pushed])
        return
    for one in pushed:
        _show(one, progress(ctx))


@click.command("pull-check", short_help="Pull a pushed export back and verify it.")
@click.argument("repository", metavar="USER/NAME[@REVISION]")
@click.option("--allow-unproven", is_flag=True, help="Do not ask for parity.")
@click.option("--json", "as_json", is_flag=True, help="Results as JSON.")
@click.pass_context
def pull_check(ctx: click.Context, repository: str, allow_unproven: bool, as_json: bool) -> None:
    """Pull a pushed export back and verify its files and its parity. Prints where it lies."""
    from lora2serve import console, hub

    told = progress(ctx)
    checked = hub.pull_check(repository, progress=told)
    if checked.unlisted_files:
        told.warn(f"not part of any export: {', '.join(checked.unlisted_files)}")
    if as_json:
        console.result_json(asdict(checked))
    if checked.unproven and not allow_unproven:
        problems = [f"{repository}: {name}: {why}" for name, why in checked.unproven.items()]
        raise ParityNotMet("\n".join(problems), "--allow-unproven looks at the files only")
    proven = [name for name in checked.exports if name not in checked.unproven]
    told.note(f"{checked.files} files, {console.size(checked.bytes)}, as pushed, at commit {checked.commit}")
    told.note(f"parity met: {', '.join(proven) or 'none'}")
    if not as_json:
        console.result(str(checked.path))


def _run_of(exports: tuple[Path, ...]) -> Run | None:
    """The run whose ``exports/`` hold the first of them, if it is one."""
    from lora2serve.artifacts import run as runs

    home = exports[0].resolve().parent.parent if exports else Path()
    return runs.Run(home) if exports and runs.is_run(home) else None


def _show(pushed: PushResult, told: Progress) -> None:
    from lora2serve import console

    if not pushed.dry_run:
        console.result(pushed.pull_request or pushed.url)
        return
    rows = [["add", path, console.size(size)] for path, size in pushed.uploaded.items()]
    rows += [["delete", path, ""] for path in pushed.deleted]
    rows += [["keep", path, ""] for path in pushed.unchanged]
    how = "one commit" if pushed.uploaded or pushed.deleted else "nothing to do"
    total = console.size(sum(pushed.uploaded.values()))
    told.note(f"\n{pushed.url} at {pushed.revision}: {how}, {len(pushed.uploaded)} files of {total}")
    console.table("", ["", "file", "size"], rows)
    console.result(pushed.card)
