"""Push exports to the Hub: what the manifest names, verified, with a card, as one state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora2serve.artifacts import manifest
from lora2serve.artifacts.run import Run
from lora2serve.errors import HubError, ParityNotMet, UsageError
from lora2serve.hub import card, published_report
from lora2serve.hub.card_data import ADAPTER, GGUF, GGUF_ADAPTER, MERGED, gather, kind_of, unproven
from lora2serve.hub.hub_client import LOG_IN, PUSHING, check_id, has_token, hub_errors, hub_quiet, page
from lora2serve.hub.package import CARD, Item, PushedExport, open_export, package, repository_manifest, text_item
from lora2serve.hub.remote_state import Remote, RemoteChange, change, fetch_state, old_exports, read_text
from lora2serve.hub.retry import with_retries
from lora2serve.hub.upload import MAIN, Uploader, batches
from lora2serve.progress import Progress, Silent

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SUFFIX = {MERGED: "", ADAPTER: "-lora", GGUF: "-GGUF", GGUF_ADAPTER: "-lora-GGUF"}
# With --single-repo: an adapter's config at the top would make loaders take the whole repository for an adapter.
FOLDERS = {"adapter": "adapter", "gguf-adapter": "adapter-gguf"}


@dataclass(frozen=True)
class PushResult:
    """What one repository got; of a dry run, what it would get."""

    repo_id: str
    url: str
    revision: str
    exports: list[str]
    uploaded: dict[str, int]  # path -> bytes
    deleted: list[str]
    unchanged: list[str]
    card: str
    dry_run: bool
    commits: int = 1  # more than one go to a branch first
    commit: str | None = None
    pull_request: str | None = None
    unproven: dict[str, str] = field(default_factory=dict)


def push(
    exports: Sequence[Path],
    *,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    single_repo: bool = False,
    allow_unproven: bool = False,
    run: Run | None = None,
    progress: Progress | None = None,
) -> list[PushResult]:
    """Push export directories to ``repo_id`` and the repositories named after it.

    By convention merged weights go to ``name``, an adapter to ``name-lora``, all GGUF types to ``name-GGUF``;
    with ``single_repo`` everything goes to ``name``. ``run`` gives the card its recipe and figures. Everything is
    read and checked before the first byte is sent; ``dry_run`` stops there and only reads from the Hub.

    Raises ParityNotMet for an export that is not proven (unless ``allow_unproven``), InputError for files that are
    not as the manifest says or hold a token, HubError for whatever the Hub refuses.
    """
    told = progress or Silent()
    check_id(repo_id)
    if "/" not in repo_id:
        raise UsageError(f"--repo-id {repo_id}: expected user/name", "`hf auth whoami` says who you are")
    opened = [open_export(path) for path in exports]
    if not opened:
        raise UsageError("nothing to push", "export first: `lora2serve export --target ...`")
    _refuse_unproven(opened, allow_unproven)
    grouped = group(opened, repo_id, single_repo)
    siblings = {name: members[0].manifest for name, members in grouped.items()}
    _warn_of_local_bases(opened, told)
    pushes = [_Push(name, members, siblings, revision or MAIN, run, told) for name, members in grouped.items()]
    if not dry_run and not has_token():
        raise HubError(f"{repo_id}: no token to push with", LOG_IN)
    with hub_quiet():
        for one in pushes:  # all is checked, and each repository looked at, before anything is sent to the first
            one.prepare(single_repo, private, dry_run)
        return [one.pushed() if dry_run else one.send(private, create_pr) for one in pushes]


def group(exports: Sequence[PushedExport], repo_id: str, single_repo: bool) -> dict[str, list[PushedExport]]:
    """Repository -> its exports, by convention or all in one."""
    grouped: dict[str, list[PushedExport]] = {}
    order = list(SUFFIX)  # merged weights first: the other cards name them as what they are made from
    for export in sorted(exports, key=lambda one: order.index(kind_of(one.manifest))):
        kind = kind_of(export.manifest)
        suffix = SUFFIX[kind] + (f"-{export.quant}" if kind == MERGED and export.quant else "")
        grouped.setdefault(repo_id if single_repo else repo_id + suffix, []).append(export)
    for members in grouped.values():
        names = [export.name for export in members]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UsageError(f"{', '.join(sorted(twice))}: given twice for one repository")
    return grouped


def _refuse_unproven(exports: Sequence[PushedExport], allowed: bool) -> None:
    problems = [f"{export.path}: {why}" for export in exports if (why := unproven(export.manifest))]
    if problems and not allowed:
        raise ParityNotMet("\n".join(problems), "prove it (`lora2serve parity`), or push with --allow-unproven")


def _warn_of_local_bases(exports: Sequence[PushedExport], progress: Progress) -> None:
    """An adapter is loaded by the name of its base: a path of this machine says nothing to others, and is published."""
    for export in exports:
        served = str(export.manifest.get("served_base") or "")
        if served.startswith(("/", ".", "~")):
            progress.warn(
                f"{export.path}: names its base {served}, a path of this machine, for all to read; a Hub id instead: "
                "lora2serve export --target adapter --served-base ORG/NAME --overwrite"
            )


@dataclass
class _Push:
    """One repository on its way: prepared, then sent."""

    repo_id: str
    exports: list[PushedExport]
    siblings: Mapping[str, Mapping[str, Any]]
    revision: str
    run: Run | None
    progress: Progress

    def prepare(self, single_repo: bool, private: bool, dry_run: bool) -> None:
        """Read everything, look at the repository, and work out what must change there."""
        from huggingface_hub import HfApi

        self.api: HfApi = HfApi()
        self.remote = self._look(dry_run)
        if private and self.remote.exists and not self.remote.private:
            raise HubError(
                f"{self.repo_id}: exists and is public, asked was --private",
                "make it private on its page, or choose another name",
            )
        with hub_errors(self.repo_id, self.revision, PUSHING):
            before = with_retries(lambda: old_exports(self.api, self.repo_id, self.remote), self.progress, self.repo_id)
            existing = with_retries(
                lambda: read_text(self.api, self.repo_id, self.remote, CARD), self.progress, self.repo_id
            )
        kept = [old for old in before if self._goes_with(old)]
        made = package(self.repo_id, self.exports, self.progress, FOLDERS if single_repo else {}, kept)
        made.reports = {
            one.name: published_report.items(one.name, one.path, one.manifest, self.run) for one in self.exports
        }
        content = join(repository_manifest(made), kept)
        public = content.get("exports") or {self.exports[0].name: content}
        reported = [name for name, export in public.items() if published_report.page_of(name) in export["files"]]
        local = [export.path for export in self.exports]
        self.facts = gather(self.repo_id, public, local, self.siblings, self.run, reported)
        self.card = card.write(self.facts, existing)
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        told = [item for items in made.reports.values() for item in items]
        self.items: list[Item] = [
            *made.items.values(), *told, text_item(manifest.NAME, text), text_item(CARD, self.card)
        ]  # fmt: skip
        obsolete = {name for old in before for name in old["files"]} - content["files"].keys()
        self.change: RemoteChange = change(self.remote, self.items, obsolete)

    def send(self, private: bool, create_pr: bool) -> PushResult:
        """Make the repository what was worked out."""
        if not self.change:
            self.progress.note(f"{self.repo_id}: holds all of this already")
            return self.pushed(commit=self.remote.head)
        with hub_errors(self.repo_id, self.revision, PUSHING), _xet_hint(self.repo_id):
            uploader = Uploader(self.api, self.repo_id, self.revision, self.progress)
            self.remote = uploader.ensure(self.remote, private)
            landed = uploader.publish(self.change, self._title(), self.remote, create_pr=create_pr)
        return self.pushed(commit=landed.commit, pull_request=landed.pull_request)

    def pushed(self, commit: str | None = None, pull_request: str | None = None) -> PushResult:
        """The report."""
        changed = {item.path for item in self.change.add}
        return PushResult(
            repo_id=self.repo_id,
            url=page(self.repo_id),
            revision=self.revision,
            exports=[export.name for export in self.exports],
            uploaded={item.path: item.size for item in self.change.add},
            deleted=self.change.delete,
            unchanged=[item.path for item in self.items if item.path not in changed],
            card=self.card,
            dry_run=commit is None,
            commits=len(list(batches(self.change))) if self.change else 0,
            commit=commit,
            pull_request=pull_request,
            unproven=self.facts.unproven,
        )

    def _look(self, dry_run: bool) -> Remote:
        try:
            with hub_errors(self.repo_id, self.revision, PUSHING):
                look_there = partial(fetch_state, self.api, self.repo_id, self.revision)
                return with_retries(look_there, self.progress, self.repo_id, reached=False)
        except HubError as error:
            if not dry_run:
                raise
            self.progress.note(f"{self.repo_id}: planned as if it were new ({error.message})")
            return Remote()

    def _goes_with(self, old: Mapping[str, Any]) -> bool:
        """Whether an export that is there stays: of the same base and adapter, and not replaced by this push."""
        names = {export.name for export in self.exports}
        ours = self.exports[0].manifest
        same = all(_sha(old, key) == _sha(ours, key) for key in ("base", "adapter"))
        return same and export_name(old) not in names

    def _title(self) -> str:
        """The commit's title; the same contents have the same title, so that a pull request is found again."""
        state = hashlib.sha256(self.revision.encode())
        for item in sorted(self.items, key=lambda item: item.path):
            state.update(f"\n{item.path} {item.sha256}".encode())
        names = ", ".join(export.name for export in self.exports)
        return f"{self.facts.name}: {names} [{state.hexdigest()[:12]}]"


def join(whole: dict[str, Any], kept: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The repository's manifest with the exports that stay there."""
    if not kept:
        return whole
    exports = dict(whole.get("exports") or {export_name(whole): whole})
    exports |= {export_name(old): old for old in kept}
    first = next(iter(exports.values()))
    same = {key: value for key, value in first.items() if all(other.get(key) == value for other in exports.values())}
    files = {name: entry for export in exports.values() for name, entry in export["files"].items()}
    return {**same, "exports": dict(sorted(exports.items())), "files": dict(sorted(files.items()))}


def export_name(content: Mapping[str, Any]) -> str:
    """``gguf-Q4_K_M`` for the manifest of that export."""
    return f"{content['target']}-{content['quant']}" if content.get("quant") else str(content["target"])


def _sha(content: Mapping[str, Any], key: str) -> Any:
    part = content.get(key) or {}
    return part.get("sha256") or part.get("fingerprint")


@contextmanager
def _xet_hint(repo_id: str) -> Iterator[None]:
    """A hub without Xet fails deep inside hf_xet; say what helps."""
    from huggingface_hub import constants
    from huggingface_hub.utils._runtime import is_xet_available

    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        if constants.HF_HUB_DISABLE_XET or not is_xet_available() or "xet" not in f"{error} {error.__cause__}".lower():
            raise
        raise HubError(
            f"pushing to {repo_id}: the upload by Xet failed", "if this hub has no Xet storage: HF_HUB_DISABLE_XET=1"
        ) from error
