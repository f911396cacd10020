"""Getting files into a repository so that a reader sees the old state or the new one, never a mix.

Contents go up first and show nothing. Then one commit publishes all of them, on the branch or as a pull request, and
what the Hub then shows is compared with ours. Every step looks at the repository before it acts, so a step whose answer
was lost is not done twice, and a second run resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from lora2serve.errors import HubError, did_you_mean
from lora2serve.hub.hub_client import hub_progress
from lora2serve.hub.package import UploadItem
from lora2serve.hub.remote_state import Remote, RemoteChange, change, fetch_state
from lora2serve.hub.retry import status_of, with_retries
from lora2serve.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

T = TypeVar("T")
MAIN = "main"


@dataclass(frozen=True)
class UploadResult:
    """Where a push ended: the commit a reader gets, or the open pull request."""

    commit: str
    pull_request: str | None = None


@dataclass
class Uploader:
    """One push into one revision of one repository."""

    api: HfApi
    repo_id: str
    revision: str
    progress: Progress
    _sent: dict[str, CommitOperationAdd] = field(default_factory=dict)

    def publish(self, wanted: RemoteChange, title: str, start: Remote, *, create_pr: bool) -> UploadResult:
        """Bring ``wanted`` into the repository that looked like ``start``; verified by what the Hub then shows."""
        self._upload(wanted.add, create_pr)
        if create_pr:
            return self._into_pull_request(wanted, title, start)
        head = self._commit(self.revision, wanted, title, start.head)
        self._verify(self.revision, wanted)
        return UploadResult(head)

    def ensure(self, remote: Remote, private: bool) -> Remote:
        """The repository and the branch, made where they are not there yet."""
        if not remote.exists:
            self._again(lambda: self._create(private))
        if remote.head is None and self.revision != MAIN:
            self._again(lambda: self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True))
        return remote if remote.head else self._again(lambda: fetch_state(self.api, self.repo_id, self.revision))

    def _create(self, private: bool) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        try:
            self.api.create_repo(self.repo_id, private=private or None, exist_ok=True)
        except HfHubHTTPError as error:
            if status_of(error) != 403:
                raise
            owner, me = self.repo_id.split("/")[0], self.api.whoami()
            spaces = [str(me["name"]), *(str(group["name"]) for group in me.get("orgs") or [])]
            if owner in spaces:
                raise
            raise HubError(
                f"{self.repo_id}: your token is {spaces[0]}'s, who may not create repositories of {owner}"
                + did_you_mean(owner, spaces),
                f"--repo-id {spaces[0]}/{self.repo_id.split('/')[1]}, or a token of {owner}",
            ) from None

    # -- contents

    def _upload(self, items: Sequence[UploadItem], create_pr: bool) -> None:
        """The contents of large files into the Hub's storage, where nobody sees them yet."""
        operations = [self._operation(item) for item in items]
        if operations:
            with hub_progress(self.progress):
                self._again(lambda: self._preupload(operations, create_pr))

    def _preupload(self, additions: list[CommitOperationAdd], create_pr: bool) -> None:
        # An empty gitignore: the repository's own must not drop files of an export without a word.
        self.api.preupload_lfs_files(
            self.repo_id,
            additions,
            revision=self.revision,
            create_pr=create_pr,
            free_memory=False,
            gitignore_content="",
        )

    def _operation(self, item: UploadItem) -> CommitOperationAdd:
        from huggingface_hub import CommitOperationAdd

        if item.path not in self._sent:
            source = item.source if isinstance(item.source, bytes) else str(item.source)
            operation = self._sent[item.path] = CommitOperationAdd(item.path, source)
            operation.upload_info.sha256 = bytes.fromhex(item.sha256)  # known: the file need not be read for it
        return self._sent[item.path]

    # -- commits

    def _commit(self, revision: str, wanted: RemoteChange, title: str, head: str | None) -> str:
        """One commit on top of ``head``, and only there; the new head."""
        from huggingface_hub.errors import HfHubHTTPError

        operations = self._operations(wanted)

        def attempt() -> str:
            now = fetch_state(self.api, self.repo_id, revision)
            if not change(now, wanted.add, wanted.delete):
                return str(now.head)  # a try before this one got through, only its answer was lost
            if now.head != head:
                raise self._moved(revision)
            try:
                commit = self.api.create_commit(
                    self.repo_id, operations, commit_message=title, revision=revision, parent_commit=head
                )
            except HfHubHTTPError as error:
                if status_of(error) != 412:
                    raise
                now = fetch_state(self.api, self.repo_id, revision)
                if change(now, wanted.add, wanted.delete):
                    raise self._moved(revision) from None
                return str(now.head)
            return str(commit.oid)

        return self._again(attempt)

    def _operations(self, wanted: RemoteChange) -> list[CommitOperationAdd | CommitOperationDelete]:
        from huggingface_hub import CommitOperationDelete

        deletions = [CommitOperationDelete(path, is_folder=False) for path in wanted.delete]
        return [*(self._operation(item) for item in wanted.add), *deletions]

    def _into_pull_request(self, wanted: RemoteChange, title: str, start: Remote) -> UploadResult:
        number, url, is_new = self._again(lambda: self._open_pull_request(wanted, title, start))
        revision = f"refs/pr/{number}"
        now = self._again(lambda: fetch_state(self.api, self.repo_id, revision))
        missing = change(now, wanted.add, wanted.delete)
        if missing and not is_new:  # an earlier push opened it, and what it holds is not ours
            self._commit(revision, missing, title, now.head)
        return UploadResult(self._verify(revision, wanted), url)

    def _open_pull_request(self, wanted: RemoteChange, title: str, start: Remote) -> tuple[int, str, bool]:
        """The open pull request of that title: its number and address, and whether it was made now."""
        me = str(self.api.whoami()["name"])
        for known in self.api.get_repo_discussions(
            self.repo_id, author=me, discussion_type="pull_request", discussion_status="open"
        ):
            if known.title == title and known.author == me:  # what a stranger opened under that title is not ours
                return known.num, known.url, False
        commit = self.api.create_commit(
            self.repo_id,
            self._operations(wanted),
            commit_message=title,
            revision=self.revision,
            parent_commit=start.head,
            create_pr=True,
        )
        return int(commit.pr_num or 0), str(commit.pr_url), True

    def _verify(self, revision: str, wanted: RemoteChange) -> str:
        """What the Hub shows must be what we have; the head that was compared."""
        now = self._again(lambda: fetch_state(self.api, self.repo_id, revision))
        wrong = change(now, wanted.add, wanted.delete)
        if not wrong:
            return str(now.head)
        names = [*(item.path for item in wrong.add), *wrong.delete]
        raise HubError(
            f"{self.repo_id}@{revision}: the Hub shows other contents for {', '.join(names[:5])}"
            + (f" and {len(names) - 5} more" if len(names) > 5 else ""),
            "run again: correct files stay, the rest is sent again",
        )

    def _moved(self, revision: str) -> HubError:
        return HubError(
            f"{self.repo_id}@{revision}: someone else committed while this push was under way; nothing was overwritten",
            "run again to push on top of it: what is uploaded stays uploaded",
        )

    def _again(self, act: Callable[[], T]) -> T:
        return with_retries(act, self.progress, self.repo_id)
