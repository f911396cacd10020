"""``lora2serve.verify``: whether exports, here or on the Hub, are what was exported and proven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora2serve import hub
from lora2serve.api.locate import Located, find_run
from lora2serve.api.registered import directory_of, exports_of, registered_version
from lora2serve.artifacts.export_dir import Export
from lora2serve.config.arguments import checked
from lora2serve.console import default_progress
from lora2serve.errors import InputError, ParityNotMet, UsageError
from lora2serve.progress import Progress
from lora2serve.system.small_files import plain_path


@dataclass(frozen=True)
class Verified:
    """Exports whose files are those of their manifest. ``unproven`` says which have no proof of parity, and why."""

    path: Path
    exports: tuple[str, ...]
    files: int
    bytes: int
    unproven: Mapping[str, str]
    repo_id: str | None = None
    commit: str | None = None
    unlisted_files: Sequence[str] = ()  # in the repository, and in no manifest

    def require_proof(self, name: str | Path) -> None:
        """ParityNotMet where an export has no proof; ``name`` is what the user called it."""
        if self.unproven:
            problems = [f"{name}: {export}: {reason}" for export, reason in self.unproven.items()]
            raise ParityNotMet("\n".join(problems), "--allow-unproven looks at the files only")


@checked
def verify(name: str | Path, *, allow_unproven: bool = False, progress: Progress | None = None) -> Verified:
    """Compare every file with the sha256 in its manifest, and ask for the proof of parity.

    name: an export directory, a run (all of its exports), or ``user/name[@revision]`` on the Hub, which is downloaded.
    allow_unproven: look at the files only.
    progress: where messages and bars go. By default they are shown at a prompt or in a notebook only.

    Raises InputError and HubError for files that differ or are missing, ParityNotMet for an export without proof.
    """
    progress = progress or default_progress()
    if registered_version(name):
        exports = exports_of([name])
        return _verified(_verify_here(exports, Path(directory_of(name))), name, allow_unproven)
    run = find_run(name)
    path = plain_path(Path(name).expanduser())
    if run or path.exists():
        verified = _verify_here(run.list_exports() if run else [path], run.path if run else path)
    else:
        hub.refuse_missing_path(str(name))
        checked = hub.pull_check(str(name), progress=progress)
        verified = Verified(
            checked.path, tuple(checked.exports), checked.files, checked.bytes, checked.unproven, checked.repo_id,
            checked.commit, checked.unlisted_files,
        )  # fmt: skip
    return _verified(verified, name, allow_unproven)


def _verified(verified: Verified, name: str | Path, allow_unproven: bool) -> Verified:
    if not allow_unproven:
        verified.require_proof(name)
    return verified


def _verify_here(exports: Sequence[Path], path: Path) -> Verified:
    if not exports or not all(Located(export, str(export)).is_export for export in exports):
        raise UsageError(f"{path}: no export here", "`lora2serve inspect` says what it is")
    opened = [Export.open(export) for export in exports]
    problems = [f"{export.path.name}: {problem}" for export in opened for problem in export.verify()]
    if problems:
        raise InputError("\n".join(f"{path}: {problem}" for problem in problems), "export again, or copy it again")
    reasons = {export.path.name: reason for export in opened if (reason := export.manifest.unproven())}
    files = sum(len(export.manifest.files) for export in opened)
    names = tuple(export.path.name for export in opened)
    return Verified(path, names, files, sum(export.bytes for export in opened), reasons)
