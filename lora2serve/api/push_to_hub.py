"""``lora2serve.push``: exports to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence

from lora2serve import hub
from lora2serve.api.export_request import Named, several
from lora2serve.api.locate import run_of_export
from lora2serve.api.registered import exports_of
from lora2serve.artifacts import run as runs
from lora2serve.config.arguments import checked
from lora2serve.console import default_progress
from lora2serve.hub import PushResult
from lora2serve.progress import Progress


@checked
def push(
    exports: Named | Sequence[Named] = (), *,
    repo_id: str, private: bool = False, revision: str | None = None, create_pr: bool = False,
    single_repo: bool = False, allow_unproven: bool = False, dry_run: bool = False, progress: Progress | None = None,
) -> list[PushResult]:  # fmt: skip
    """Push export directories to the Hugging Face Hub, each repository as one state, model card included.

    exports: export directories; all of ``runs/latest`` by default.
    repo_id: ``user/name``. Merged weights go there, an adapter to ``name-lora``, all GGUF types to ``name-GGUF``.
    private: make new repositories private, and refuse one that is public.
    revision: a branch, made if it does not exist; ``main`` by default.
    create_pr, single_repo: leave it as a pull request; put everything into ``repo_id`` itself.
    allow_unproven: push exports whose parity is not proven; the card says so.
    dry_run: return what would be uploaded, and the card; send nothing.
    progress: where messages and bars go. By default they are shown at a prompt or in a notebook only.

    Raises ParityNotMet for an export that is not proven, InputError for files that are not as their manifest says or
    that hold a token, and HubError for whatever the Hub refuses, all before anything is sent. The token is that of
    ``hf auth login`` or HF_TOKEN.
    """
    progress = progress or default_progress()
    named = several(exports)
    paths = exports_of(named)
    paths = hub.choose(paths, progress) if len(paths) > len(named) else paths
    run = run_of_export(paths[0]) if paths else runs.latest()
    if run and not paths:
        paths = hub.choose(run.list_exports(), progress)
    return hub.push(
        paths, repo_id=repo_id, private=private, revision=revision, create_pr=create_pr, single_repo=single_repo,
        allow_unproven=allow_unproven, dry_run=dry_run, run=run, progress=progress,
    )  # fmt: skip
