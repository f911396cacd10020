"""Push exports to the Hub: what the manifest names, verified, with a card, as one state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.manifest import NAME, Manifest
from lora2serve.artifacts.run import Run
from lora2serve.errors import HubError, ParityNotMet, UsageError
from lora2serve.hub import card, published_report
from lora2serve.hub.card_data import ADAPTER, GGUF, GGUF_ADAPTER, MERGED, gather, kind_of
from lora2serve.hub.hub_client import LOG_IN, PUSHING, has_token, hub_errors, hub_quiet, page, refuse_id
from lora2serve.hub.package import CARD, UploadItem, open_export, package, repository_manifest, text_item
from lora2serve.hub.remote_state import Remote, RemoteChange, change, fetch_state, old_exports, read_text
from lora2serve.hub.retry import with_retries
from lora2serve.hub.upload import MAIN, Uploader
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
    progress = progress or Silent()
    refuse_id(repo_id, "--repo-id ")
    opened = [open_export(path) for path in exports]
    if not opened:
        raise UsageError("nothing to push", "export first: `lora2serve export --target ...`")
    _refuse_unproven(opened, allow_unproven, dry_run, progress)
    grouped = group(opened, repo_id, single_repo)
    siblings = {name: members[0].manifest for name, members in grouped.items()}
    _warn_of_local_bases(opened, progress)
    pushes = [_Push(name, members, siblings, revision or MAIN, run, progress) for name, members in grouped.items()]
    if not dry_run and not has_token():
        raise HubError(f"{repo_id}: no token to push with", LOG_IN)
    with hub_quiet():
        for each in pushes:  # all is checked, and each repository looked at, before anything is sent to the first
            each.prepare(single_repo, private, dry_run)
        return [each.result() if dry_run else each.send(private, create_pr) for each in pushes]


def group(exports: Sequence[Export], repo_id: str, single_repo: bool) -> dict[str, list[Export]]:
    """Repository -> its exports, by convention or all in one."""
    grouped: dict[str, list[Export]] = {}
    order = list(SUFFIX)  # merged weights first: the other cards name them as what they are made from
    for export in sorted(exports, key=lambda export: order.index(kind_of(export.manifest))):
        kind = kind_of(export.manifest)
        suffix = SUFFIX[kind] + (f"-{export.quant}" if kind == MERGED and export.quant else "")
        grouped.setdefault(repo_id if single_repo else repo_id + suffix, []).append(export)
    for members in grouped.values():
        names = [export.name for export in members]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UsageError(f"{', '.join(sorted(twice))}: given twice for one repository")
    return grouped


def _refuse_unproven(exports: Sequence[Export], allowed: bool, dry_run: bool, progress: Progress) -> None:
    """A dry run shows its card, which says so too, and what the push would be refused for."""
    problems = [f"{export.path}: {why}" for export in exports if (why := export.manifest.unproven())]
    if dry_run and not allowed:
        for problem in problems:
            progress.warn(f"{problem}: the push would be refused")
    elif problems and not allowed:
        raise ParityNotMet("\n".join(problems), "prove it (`lora2serve parity`), or push with --allow-unproven")


def _warn_of_local_bases(exports: Sequence[Export], progress: Progress) -> None:
    """An adapter is loaded by the name of its base: a path of this machine says nothing to others, and is published."""
    for export in exports:
        served = export.manifest.served_base or ""
        if served.startswith(("/", ".", "~")):
            progress.warn(
                f"{export.path}: names its base {served}, a path of this machine, for all to read; a Hub id instead: "
                "lora2serve export --target adapter --served-base ORG/NAME --overwrite"
            )


@dataclass
class _Push:
    """One repository on its way: prepared, then sent."""

    repo_id: str
    exports: list[Export]
    siblings: Mapping[str, Manifest]
    revision: str
    run: Run | None
    progress: Progress

    def prepare(self, single_repo: bool, private: bool, dry_run: bool) -> None:
        """Read everything, look at the repository, and work out what must change there."""
        from huggingface_hub import HfApi

        self.api: HfApi = HfApi()
        self.remote = self._fetch_state(dry_run)
        if private and self.remote.exists and not self.remote.private:
            raise HubError(
                f"{self.repo_id}: exists and is public, but --private was given",
                "make it private on its page, or choose another name",
            )
        with hub_errors(self.repo_id, self.revision, PUSHING):
            before = with_retries(lambda: old_exports(self.api, self.repo_id, self.remote), self.progress, self.repo_id)
            existing = with_retries(
                lambda: read_text(self.api, self.repo_id, self.remote, CARD), self.progress, self.repo_id
            )
        staying = [old for old in before if self._stays(old)]
        prepared = package(self.repo_id, self.exports, self.progress, FOLDERS if single_repo else {}, staying)
        prepared.reports = {export.name: published_report.items(export, self.run) for export in self.exports}
        content = repository_manifest(prepared, staying)
        public = content.each_export()
        reported = [name for name, export in public.items() if published_report.page_of(name) in export.files]
        self.card_data = gather(self.repo_id, public, self.exports, self.siblings, self.run, reported)
        self.card = card.write(self.card_data, existing)
        reports = [item for items in prepared.reports.values() for item in items]
        own = [text_item(NAME, content.to_text()), text_item(CARD, self.card)]
        self.items: list[UploadItem] = [*prepared.items.values(), *reports, *own]
        obsolete = {name for old in before for name in old.files} - content.files.keys()
        self.change: RemoteChange = change(self.remote, self.items, obsolete)

    def send(self, private: bool, create_pr: bool) -> PushResult:
        """Make the repository what was worked out."""
        if not self.change:
            self.progress.note(f"{self.repo_id}: holds all of this already")
            return self.result(commit=self.remote.head)
        with hub_errors(self.repo_id, self.revision, PUSHING), _xet_hint(self.repo_id):
            uploader = Uploader(self.api, self.repo_id, self.revision, self.progress)
            self.remote = uploader.ensure(self.remote, private)
            uploaded = uploader.publish(self.change, self._title(), self.remote, create_pr=create_pr)
        return self.result(commit=uploaded.commit, pull_request=uploaded.pull_request)

    def result(self, commit: str | None = None, pull_request: str | None = None) -> PushResult:
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
            commit=commit,
            pull_request=pull_request,
            unproven=self.card_data.unproven,
        )

    def _fetch_state(self, dry_run: bool) -> Remote:
        try:
            with hub_errors(self.repo_id, self.revision, PUSHING):
                fetch = partial(fetch_state, self.api, self.repo_id, self.revision)
                return with_retries(fetch, self.progress, self.repo_id, reached=False)
        except HubError as error:
            if not dry_run:
                raise
            self.progress.note(f"{self.repo_id}: planned as if it were new ({error.message})")
            return Remote()

    def _stays(self, old: Manifest) -> bool:
        """Whether an export that is there stays: of the same base and adapter, and not replaced by this push."""
        ours = self.exports[0].manifest
        same = old.base.fingerprint == ours.base.fingerprint and _adapter_hash(old) == _adapter_hash(ours)
        return same and old.export_name not in {export.name for export in self.exports}

    def _title(self) -> str:
        """The commit's title; the same contents have the same title, so that a pull request is found again."""
        state = hashlib.sha256(self.revision.encode())
        for item in sorted(self.items, key=lambda item: item.path):
            state.update(f"\n{item.path} {item.sha256}".encode())
        names = ", ".join(export.name for export in self.exports)
        return f"{self.card_data.name}: {names} [{state.hexdigest()[:12]}]"


def _adapter_hash(manifest: Manifest) -> Mapping[str, str] | None:
    return manifest.adapter.sha256 if manifest.adapter else None


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
