"""``lora2serve push`` and ``lora2serve verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora2serve.cli.options import (
    Command,
    complete_exports,
    dry_run_option,
    exports_argument,
    json_option,
    plain,
    progress,
    renamed,
)  # fmt: skip

if TYPE_CHECKING:
    from lora2serve.hub import PushResult
    from lora2serve.progress import Progress


@click.command(
    cls=Command,
    short_help="Push exports to the Hugging Face Hub.",
    examples=[
        ("lora2serve push --repo-id you/demo", "all exports of runs/latest"),
        ("lora2serve push runs/demo/exports/adapter --repo-id you/demo --private", "one of them"),
        ("lora2serve push --repo-id you/demo --dry-run", "the files and the card"),
    ],
)
@exports_argument
@click.option(
    "--repo-id", required=True, metavar="USER/NAME", help="Where to; -lora and -GGUF are appended by convention."
)
@click.option("--private", is_flag=True, help="Make new repositories private; refuse a public one.")
@click.option("--revision", metavar="BRANCH", help="Push to this branch, created if it does not exist (default: main).")
@click.option("--create-pr", is_flag=True, help="Leave it as a pull request.")
@click.option("--single-repo", is_flag=True, help="Everything into one repository.")
@click.option("--allow-unproven", is_flag=True, help="Push exports whose parity is not proven; the card says so.")
@dry_run_option(help="Show the files and the card; send nothing.")
@json_option
@click.pass_context
def push(
    ctx: click.Context, /, exports: tuple[Path, ...], repo_id: str, private: bool, revision: str | None,
    create_pr: bool, single_repo: bool, allow_unproven: bool, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Push EXPORTs (default: all of runs/latest) to the Hugging Face Hub, card included.

    The token is the one of `hf auth login` or HF_TOKEN. Prints the repositories' addresses.
    """
    from lora2serve import console
    from lora2serve.api import push_to_hub

    results = push_to_hub.push(
        exports, repo_id=repo_id, private=private, revision=revision, create_pr=create_pr, single_repo=single_repo,
        allow_unproven=allow_unproven, dry_run=dry_run, progress=progress(ctx),
    )  # fmt: skip
    if as_json:
        console.result_json(plain(results))
        return
    for result in results:
        _show(result, progress(ctx))


@click.command(
    cls=Command,
    short_help="Check that exports, here or on the Hub, are what was exported and proven.",
    examples=[
        ("lora2serve verify runs/latest", "all exports of a run"),
        ("lora2serve verify you/demo-GGUF", "what was pushed, downloaded first"),
        ("lora2serve verify you/demo@v1 --allow-unproven", "files only, at a revision"),
    ],
)
@click.argument("name", metavar="PATH|USER/NAME[@REVISION]", shell_complete=complete_exports)
@click.option("--allow-unproven", is_flag=True, help="Do not require parity.")
@json_option
@click.pass_context
def verify(ctx: click.Context, name: str, allow_unproven: bool, as_json: bool) -> None:
    """Compare every file with its sha256 in the manifest, and ask for the proof of parity. Prints the path.

    PATH is an export or a run; a repository of the Hub is downloaded. Exit code 3 for an export without proof.
    """
    from lora2serve import console
    from lora2serve.api import verify_copy

    verified = verify_copy.verify(name, allow_unproven=True, progress=progress(ctx))
    if verified.unlisted_files:
        progress(ctx).warn(f"not part of any export: {', '.join(verified.unlisted_files)}")
    if as_json:
        console.result_json(plain(verified))
    if not allow_unproven:
        verified.require_proof(name)
    commit = f", as pushed, at commit {verified.commit}" if verified.commit else ", as exported"
    progress(ctx).note(f"{verified.files} files, {console.size(verified.bytes)}{commit}")
    proven = [export for export in verified.exports if export not in verified.unproven]
    progress(ctx).note(f"parity met: {', '.join(proven) or 'none'}")
    if not as_json:
        console.result(str(verified.path))


@click.command("pull-check", hidden=True, short_help="The former name of verify.")
@click.argument("repository", metavar="USER/NAME[@REVISION]")
@click.option("--allow-unproven", is_flag=True, help="Do not require parity.")
@json_option
@click.pass_context
def pull_check(ctx: click.Context, repository: str, allow_unproven: bool, as_json: bool) -> None:
    """The former name of `lora2serve verify`."""
    renamed(ctx, "pull-check", "verify")
    ctx.invoke(verify, name=repository, allow_unproven=allow_unproven, as_json=as_json)


def _show(pushed: PushResult, progress: Progress) -> None:
    from lora2serve import console

    if not pushed.dry_run:
        console.result(pushed.pull_request or pushed.url)
        return
    rows = [["add", path, console.size(size)] for path, size in pushed.uploaded.items()]
    rows += [["delete", path, ""] for path in pushed.deleted]
    rows += [["keep", path, ""] for path in pushed.unchanged]
    how = "one commit" if pushed.uploaded or pushed.deleted else "nothing to do"
    total = console.size(sum(pushed.uploaded.values()))
    progress.note(f"\n{pushed.url} at {pushed.revision}: {how}, {len(pushed.uploaded)} files of {total}")
    console.table("", ["", "file", "size"], rows)
    console.result(pushed.card)
