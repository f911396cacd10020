"""What a user names: a run, an export, an adapter or a model; by path, by name under ``runs/``, as a version of a
registry, or by its Hub id.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.adapters.adapter import CONFIG, read_config
from lora2serve.api.registered import directory_of
from lora2serve.artifacts import run as runs
from lora2serve.artifacts.lineage import BaseRecord
from lora2serve.artifacts.manifest import NAME as MANIFEST
from lora2serve.errors import UsageError
from lora2serve.progress import Progress

if TYPE_CHECKING:
    from lora2serve.registry.version_source import VersionSource


@dataclass(frozen=True)
class Located:
    """A local directory; ``name`` is what the user called it."""

    path: Path
    name: str
    run: runs.Run | None = None

    @property
    def is_export(self) -> bool:
        """Whether it is an export, or a bundle of them."""
        return (self.path / MANIFEST).is_file()

    @property
    def is_adapter(self) -> bool:
        """Whether it is a PEFT adapter directory."""
        return (self.path / CONFIG).is_file()


def locate(source: str | Path | None, progress: Progress, *, pickle: bool = False, weights: bool = True) -> Located:
    """The directory that ``source`` means; without one, the run that was made last.

    ``pickle`` also fetches a pickled adapter from the Hub; without ``weights`` only small files come from there.
    Raises UsageError where there is no run, InputError for a path that does not exist, HubError for what the Hub does
    not give.
    """
    name = str(runs.latest().path) if source is None else str(source)
    directory = directory_of(name)
    run = find_run(directory)
    if run:
        return Located(run.path, name, run)
    return Located(fetch(directory, progress, pickle=pickle, weights=weights), name)


def find_run(name: str | Path) -> runs.Run | None:
    """The finished run of that path, or of that name under ``runs/``; UsageError for one that was cut off."""
    name = directory_of(name)
    path = Path(name).expanduser()
    run = next((runs.Run(runs.followed(path)) for path in (path, runs.ROOT / name) if runs.is_run(path)), None)
    if run is None:
        runs.refuse_cut_off(path if path.exists() else runs.ROOT / name)
    return run


def find_source(name: str | Path) -> VersionSource:
    """A run, an adapter or an export; UsageError for anything else."""
    from lora2serve.registry import version_source

    directory = directory_of(name)
    run, path = find_run(directory), Path(directory).expanduser()
    if run:
        return version_source.of_run(run)
    if (path / MANIFEST).is_file():
        return version_source.of_export(path)
    if (path / CONFIG).is_file():
        return version_source.of_adapter(path)
    what = "no such directory" if not path.exists() else "not a run, an adapter or an export"
    raise UsageError(f"{name}: {what}", "name a run, or a directory that `lora2serve export` printed")


def find_export(name: str | Path) -> Path:
    """An export's directory; UsageError for anything else."""
    directory = Path(directory_of(name))
    if not (directory / MANIFEST).is_file():
        raise UsageError(f"{name}: not an export", "name a directory that `lora2serve export` printed")
    return directory


def run_of_export(export: Path) -> runs.Run | None:
    """The run whose ``exports/`` hold that directory, if it is one."""
    home = export.resolve().parent.parent
    return runs.Run(home) if runs.is_run(home) else None


def fetch(name: str | Path, progress: Progress, *, pickle: bool = False, weights: bool = True) -> Path:
    """A local directory for a path or a Hub id."""
    from lora2serve.hub import fetch as pull

    return pull(str(directory_of(name)), pickle=pickle, weights=weights, progress=progress).path


def base_of_run(
    base: BaseRecord, requested: str | Path | None, progress: Progress, *, weights: bool = True
) -> tuple[Path, str]:
    """The base of a run and its name: as requested, or where it was at training, or the Hub by its id and revision."""
    if requested:
        return fetch(requested, progress, weights=weights), str(requested)
    if base.local:
        return base.local, base.id
    if not base.id:
        raise UsageError("its manifest does not name its base", "name it with --base")
    return fetch(base.pinned, progress, weights=weights), base.id


def base_of_adapter(adapter: Path, requested: str | Path | None) -> str:
    """The name of the base of an adapter directory: as requested, or what its config says, at the revision there."""
    if requested:
        return str(requested)
    config = read_config(adapter)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base:
        raise UsageError(f"{adapter}: its config does not name a base", "name it with --base")
    if Path(base).is_absolute() and not Path(base).exists():
        raise UsageError(f"{adapter}: trained on {base}, which is not on this machine", "name the base with --base")
    return f"{base}@{revision}" if revision and not Path(base).exists() else str(base)
