"""``NAME@7``, ``NAME@champion`` and ``NAME@champion/vllm`` where a command takes a run, an adapter or an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora2serve.artifacts.run import Run
from lora2serve.artifacts.suite_scores import SuiteScores
from lora2serve.artifacts.version_marker import is_of_version
from lora2serve.errors import UsageError, did_you_mean
from lora2serve.registry.location import find_location
from lora2serve.registry.version_reference import VersionReference, parse_reference

Named = str | Path


def directory_of(name: Named) -> Named:
    """The directory of the version that is named: a run, an adapter or an export; any other name as it is.

    What lies here by that name goes first, and an id of the Hub is none of a version that is registered.
    """
    reference = registered_version(name)
    if reference is None:
        return name
    from lora2serve.api.version_registry import Registry

    with Registry() as registry:
        return registry.path(str(reference))


def exports_of(names: Sequence[Named], targets: Sequence[str] = ()) -> list[Path]:
    """The exports that are named; of a version all of them, or the one that is for the first of ``targets``."""
    paths: list[Path] = []
    for name in names:
        reference = registered_version(name)
        if reference is None or reference.export:
            paths.append(Path(directory_of(name)))
            continue
        from lora2serve.api.version_registry import Registry

        with Registry() as registry:
            version = registry.get(str(reference))
            if not version.exports:
                way_out = f"`lora2serve export {name} --target vllm` makes one, `lora2serve registry add` registers it"
                raise UsageError(f"{name}: has no exports", way_out)
            ranked = sorted(version.exports, key=lambda export: _rank(export.target, targets))
            chosen = ranked[:1] if targets else version.exports
            paths += [registry.path(f"{version.reference}/{export.name}") for export in chosen]
    return paths


def registered_version(name: Named) -> VersionReference | None:
    """The version that is meant; None for any other name. UsageError for one that is nearly that of a version."""
    reference = parse_reference(str(name))
    if reference is None or Path(name).exists():
        return None
    location = find_location()
    if location.folder and not location.file.is_file():
        if reference.number is None:
            return None
        raise UsageError(
            f"{name}: no registry at {location.shown}", "run it beside the folder, or name it: LORA2SERVE_REGISTRY"
        )
    from lora2serve.api.version_registry import Registry

    with Registry() as registry:
        known = registry.names()
    near = did_you_mean(reference.name, known)
    if reference.name not in known and near:
        raise UsageError(f"{name}: no versions of {reference.name}{near}", f"registered: {', '.join(known[:20])}")
    return reference if reference.name in known else None


def exports_home(run: Run) -> Path:
    """Where new exports of a run go: into it, but for a version, which does not change: those lie here."""
    return Path("exports") / run.name if is_of_version(run.path) else run.exports


def record_scores(name: Named, scores: SuiteScores) -> None:
    """Write what a version reached on a suite into its registry; nothing for any other name, and for its exports."""
    reference = registered_version(name)
    if reference is None or reference.export:
        return
    from lora2serve.api.version_registry import Registry

    with Registry() as registry:
        registry.score(str(reference), scores)


def record_parity(run: Run | None, exports: Sequence[Path]) -> None:
    """Write what parity found into the registry, where that lies in directories of versions."""
    homes = {path.resolve().parent.parent for path in exports} | ({run.path.resolve()} if run else set())
    for home in filter(is_of_version, homes):
        from lora2serve.api.version_registry import Registry

        with Registry() as registry:
            registry.record_parity(home)


def _rank(target: str, targets: Sequence[str]) -> int:
    return targets.index(target) if target in targets else len(targets)
