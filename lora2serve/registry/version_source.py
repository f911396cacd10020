"""What becomes a version: a run, an adapter or an export; its files, and by what it is known again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from stat import S_ISREG

from lora2serve.adapters.adapter import CONFIG
from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.manifest import NAME as MANIFEST
from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.run import RECORD, Run, is_run
from lora2serve.artifacts.suite_scores import FOLDER as EVALS
from lora2serve.artifacts.suite_scores import SuiteScores
from lora2serve.errors import InputError, UsageError, raise_all
from lora2serve.registry.version_facts import (
    BASE_NAME,
    VersionFacts,
    VersionSettings,
    read_facts,
    read_scores,
    read_settings,
    utc,
)  # fmt: skip
from lora2serve.system.small_files import digest, is_relative, read_json

ADAPTER, EXPORTS, PARITY = "adapter", "exports", "parity"  # folders of a version, as those of a run
OF_RUN = (RECORD, "recipe.yaml", "eval.jsonl", "metrics.jsonl", "loss.png")


@dataclass(frozen=True)
class VersionSource:
    """A run, an adapter with exports of it, or one export alone; ``exports`` by their label."""

    run: Run | None
    adapter: Path | None
    exports: Mapping[str, Export]

    @property
    def path(self) -> Path:
        """The directory that it is."""
        return self.run.path if self.run else self.adapter or next(iter(self.exports.values())).path

    def files(self) -> dict[str, Path]:
        """Path in the version -> the file here, without manifests.

        InputError for a link that leads out of its folder, for what is no file, and for a name that is no text.
        """
        paths: dict[str, Path] = {}
        if self.run:
            own = [self.run.path / name for name in OF_RUN if (self.run.path / name).is_file()]
            paths |= _plain(self.run.path, own)
            for folder in (EVALS, PARITY):
                paths |= _inside(self.run.path, folder)
        if self.run and self.adapter == self.run.adapter:
            paths |= _inside(self.run.path, ADAPTER)
        elif self.adapter:
            paths |= {f"{ADAPTER}/{name}": path for name, path in _inside(self.adapter).items()}
        for label, export in self.exports.items():
            inside = _inside(export.path)
            inside.pop(MANIFEST)
            paths |= {f"{EXPORTS}/{label}/{name}": path for name, path in inside.items()}
        return dict(sorted(paths.items()))

    def identity(self, sums: Mapping[str, str]) -> str:
        """The sha256 of what answers: of its adapter's files, or of those of its one export, whatever its base is
        called; ``sums`` has that of each file by its path in the version.
        """
        folder = f"{ADAPTER}/" if self.adapter else f"{EXPORTS}/{next(iter(self.exports))}/"
        own = {name.removeprefix(folder): sha256 for name, sha256 in sums.items() if name.startswith(folder)}
        if CONFIG in own:
            own[CONFIG] = _sum_without_base((self.adapter or self.path) / CONFIG)
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()

    def created(self) -> str:
        """When it was trained, or exported: the time of the last change of what answers."""
        folder = self.adapter or self.path
        times = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
        return utc(datetime.fromtimestamp(max(times), UTC))

    def facts(self) -> VersionFacts:
        """Its lineage."""
        return read_facts(self.run, self.adapter, self._manifests)

    def settings(self, facts: VersionFacts) -> VersionSettings:
        """What it is found by."""
        return read_settings(facts, self.run, self.adapter, self._manifests)

    def scores(self) -> list[SuiteScores]:
        """What was measured of it."""
        return read_scores(self.run, self.created())

    def unproven(self) -> list[str]:
        """Why its parity is not proven, a line each; empty where every export is proven."""
        if not self.exports:
            return [f"{self.path}: no export of it, so parity was not run"]
        reasons = {export.path: export.manifest.unproven() for export in self.exports.values()}
        return [f"{path}: {reason}" for path, reason in reasons.items() if reason]

    def problems(self, sums: Mapping[str, str]) -> list[str]:
        """Exports that are not as their manifest says, or that were made from another adapter than this one."""
        problems = []
        for label, export in self.exports.items():
            expected = {name: entry.sha256 for name, entry in export.manifest.files.items()}
            prefix = f"{EXPORTS}/{label}/"
            actual = {name.removeprefix(prefix): value for name, value in sums.items() if name.startswith(prefix)}
            for name in sorted(expected.keys() | actual.keys()):
                if expected.get(name) != actual.get(name):
                    reason = "missing" if name not in actual else "not part of the export"
                    problems.append(
                        f"{export.path}: {name}: {'content changed' if name in expected and name in actual else reason}"
                    )
            recorded = export.manifest.adapter.sha256 if export.manifest.adapter else {}
            other = [name for name, value in recorded.items() if sums.get(f"{ADAPTER}/{name}", value) != value]
            problems += [f"{export.path}: made from another adapter ({name} differs)" for name in other if self.adapter]
        return problems

    @property
    def _manifests(self) -> list[Manifest]:
        return [export.manifest for export in self.exports.values()]


def of_run(run: Run, exports: Sequence[Path] | None = None) -> VersionSource:
    """A run with all of its exports, or with those that are named."""
    return VersionSource(run, run.adapter, _by_label(run.list_exports() if exports is None else exports))


def of_adapter(adapter: Path, exports: Sequence[Path] = ()) -> VersionSource:
    """An adapter directory; its run, where it lies in one."""
    home = adapter.resolve().parent
    run = Run(home) if is_run(home) and adapter.resolve() == (home / ADAPTER).resolve() else None
    return VersionSource(run, adapter, _by_label(exports))


def of_export(path: Path) -> VersionSource:
    """An export; with the adapter that it was made from where that is here, and still the same."""
    export = Export.open(path)
    home = path.resolve().parent.parent
    if is_run(home):
        return of_run(Run(home), [path])
    if len(export.manifest.adapters) == 1 and (recorded := export.manifest.adapters[0]).sha256:
        paths = {name: Path(recorded.path) / name for name in recorded.sha256}
        if all(path.is_file() and digest(path)["sha256"] == recorded.sha256[name] for name, path in paths.items()):
            return of_adapter(Path(recorded.path), [path])
    return VersionSource(None, None, _by_label([path]))


def _by_label(paths: Sequence[Path]) -> dict[str, Export]:
    exports: dict[str, Export] = {}
    for path in paths:
        export = Export.open(path)
        if export.manifest.bundle:
            each = f"lora2serve registry add {path}/adapters/{export.manifest.bundle[0]} --name NAME"
            raise UsageError(f"{path}: a bundle of {len(export.manifest.bundle)} adapters, expected one", each)
        if export.name in exports:
            raise UsageError(f"{exports[export.name].path} and {path} are both {export.name}", "name one of them")
        exports[export.name] = export
    return exports


def _inside(root: Path, folder: str = "") -> dict[str, Path]:
    """The files in a folder of ``root`` by their path in ``root``."""
    top = root / folder
    if not top.resolve().is_relative_to(root.resolve()):
        return _plain(root, [top])  # a link, which is refused
    return _plain(root, [path for path in sorted(top.rglob("*")) if path.is_symlink() or not path.is_dir()])


def _plain(root: Path, paths: Iterable[Path]) -> dict[str, Path]:
    """The files by their path in ``root``; InputError for each that is no plain file there."""
    problems, plain, real = [], dict[str, Path](), root.resolve()
    for path in paths:
        name = path.relative_to(root).as_posix()
        if problem := _misfit(real, path, name):
            problems.append(f"{path}: {problem}")
        else:
            plain[name] = path
    raise_all([ascii(text) if not text.isprintable() else text for text in problems], InputError)
    return plain


def _misfit(root: Path, path: Path, name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        return "a name that is not UTF-8"
    if not name.isprintable() or not is_relative(name):
        return "a name with unprintable characters"
    real = path.resolve()
    blobs = root.parent.parent / "blobs"  # of the Hub's cache, whose snapshots are links
    if not (real.is_relative_to(root) or real.parent == blobs):
        return f"a link to {real}, outside the directory"
    return "" if real.exists() and S_ISREG(os.stat(real).st_mode) else "not a file"


def _sum_without_base(config: Path) -> str:
    content = {key: value for key, value in read_json(config, f"no {CONFIG}").items() if key != BASE_NAME}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
