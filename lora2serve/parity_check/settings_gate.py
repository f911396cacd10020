"""Gate 0: all that lies beside the weights of an export, against what base, adapter and target plan for it.

No engine is asked and no weight is read, but every byte is, for the manifest's checksums. A difference that
``parity.allow`` names was made on purpose: it is shown, and is no reason to be red.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lora2serve import __version__
from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.artifacts.manifest import NAME as MANIFEST
from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.parity_report import Gate, Metric, SettingDifference
from lora2serve.errors import Lora2ServeError
from lora2serve.exporting import settings_plan
from lora2serve.exporting.settings_plan import PlannedSettings
from lora2serve.exporting.sinks import ExportFacts, ExportModel
from lora2serve.parity_check import foreign_export
from lora2serve.parity_check.setting_differences import (
    ABSENT,
    compare_headers,
    compare_stored,
    compare_values,
    fits,
)
from lora2serve.parity_check.trained_model import open_model

MOST_OF_FILE = 40  # differences that are shown
# Files that nobody serves from: a card, and what a copy from the Hub brings along.
BYSTANDERS = ("README.md", ".gitattributes", ".cache/*", "parity/*")
PROVEN_ELSEWHERE = ("use", "tokens_proven")  # what the manifest says beside the plan


@dataclass(frozen=True)
class SettingsResult(JsonRecord):
    """The verdict, every difference, and what could not be compared, in words."""

    gate: Gate
    differences: tuple[SettingDifference, ...] = ()
    not_compared: tuple[str, ...] = ()


class SettingsComparator:
    """What compares the settings of exports of one model; ``origin`` is ``TrainedModel.json()``."""

    def __init__(self, origin: Mapping[str, Any], allow: Sequence[str] = ()) -> None:
        self._origin, self._allow = origin, allow

    def check(self, export: Path) -> SettingsResult:
        """One export's, also one that another tool made; it is never an error."""
        try:
            manifest = foreign_export.manifest_of(export, self._origin.get("name", ""))
            return check(export, manifest, open_model(self._origin, manifest), self._allow)
        except Lora2ServeError as error:
            return SettingsResult(Gate("settings", "failed", (), error.message, error.hint))
        except OSError as error:
            return SettingsResult(Gate("settings", "failed", (), f"{error.filename}: {error.strerror}"))


def check(export: Path, manifest: Manifest, model: ExportModel, allow: Sequence[str] = ()) -> SettingsResult:
    """Compare one export with the plan for it; ``allow`` are patterns of ``FILE:KEY``, ``FILE`` or ``KEY``.

    What cannot be planned or read again is a failed gate with the reason.
    """
    try:
        planned = settings_plan.plan_again(model, manifest)
    except Lora2ServeError as error:
        return SettingsResult(Gate("settings", "failed", (), f"cannot be planned again: {error.message}", error.hint))
    if planned is None:
        why = f"the settings of --target {manifest.target}, which cannot plan them again"
        return SettingsResult(Gate("settings", "skipped"), (), (why,))
    return judge(export, manifest, planned, allow)


def judge(export: Path, manifest: Manifest, planned: PlannedSettings, allow: Sequence[str] = ()) -> SettingsResult:
    """The same, against that plan."""
    if (export / MANIFEST).is_file():
        found, notes = _with_manifest(export, manifest, planned)
    else:
        found, notes = foreign_export.compare(export, planned)
    judged = tuple(_judged(difference, allow) for difference in _shortened(found))
    return SettingsResult(_verdict(judged, _count(planned)), judged, tuple(notes))


def _with_manifest(
    export: Path, manifest: Manifest, planned: PlannedSettings
) -> tuple[list[SettingDifference], list[str]]:
    """Every difference, and where there is one of which nothing was planned, in words."""
    different = list(_compare(export, manifest, planned))
    found = [difference for difference in different if not fits(difference.path, planned.unplanned)]
    found += _checksums(export, manifest, {difference.file for difference in found})
    reasons: dict[str, list[str]] = {}
    for pattern, why in planned.unplanned.items():
        if any(fnmatchcase(difference.path, pattern) for difference in different):
            reasons.setdefault(why, []).append(pattern)
    notes = [f"{', '.join(patterns)}: {why}" for why, patterns in reasons.items()]
    if found and manifest.lora2serve != __version__:
        notes.append(f"the plan of lora2serve {manifest.lora2serve}, which made the export: this is {__version__}")
    return found, notes


def _compare(export: Path, manifest: Manifest, planned: PlannedSettings) -> Iterator[SettingDifference]:
    present = {path.relative_to(export).as_posix() for path in export.rglob("*") if path.is_symlink() or path.is_file()}
    for name in [*planned.files, *planned.weights]:
        if name not in present:
            yield SettingDifference(name, "", "a file", ABSENT)
        elif (export / name).is_symlink():
            yield SettingDifference(name, "", "a file", "a link")
        elif name in planned.headers:
            yield from _compare_header(export, name, planned)
        elif name in planned.files:
            yield from compare_stored(name, planned.files[name], export / name)
    for name in sorted(present - {*planned.files, *planned.weights, MANIFEST}):
        if not fits(name, BYSTANDERS):
            yield SettingDifference(name, "", ABSENT, f"a file of {(export / name).lstat().st_size} bytes")
    yield from compare_values(MANIFEST, *_facts(planned.facts, manifest))


def _compare_header(export: Path, name: str, planned: PlannedSettings) -> list[SettingDifference]:
    try:
        return compare_headers(name, planned.headers[name], settings_plan.read_gguf(export / name))
    except Lora2ServeError as error:
        return [SettingDifference(name, "", "a file that can be read", error.message)]


def _facts(facts: ExportFacts, manifest: Manifest) -> tuple[dict[str, object], dict[str, object]]:
    """What the plan says of the export, and what its manifest does."""
    recorded = {field.name for field in fields(Manifest)} - set(PROVEN_ELSEWHERE)
    planned = {name: value for name, value in vars(facts).items() if name in recorded and value is not None}
    actual = {name: getattr(manifest, name) for name in planned}
    if facts.template:
        for side, record in ((planned, facts.template), (actual, manifest.template)):
            side["template"] = {"kind": record.kind, "requires": record.requires} if record else None
    return planned, actual


def _checksums(export: Path, manifest: Manifest, named: set[str]) -> Iterator[SettingDifference]:
    """Files that are not those of the manifest; where their settings differ, that is said already."""
    for line in manifest.verify(export):
        name, _, problem = line.rpartition(": ")
        if name not in named and not fits(name, BYSTANDERS):
            yield SettingDifference(name, "", "as in the manifest", problem)


def _shortened(differences: Sequence[SettingDifference]) -> list[SettingDifference]:
    """At most ``MOST_OF_FILE`` of each file; the others are counted."""
    by_file: dict[str, list[SettingDifference]] = {}
    for difference in differences:
        by_file.setdefault(difference.file, []).append(difference)
    shortened = []
    for name, parts in by_file.items():
        shortened += parts[:MOST_OF_FILE]
        if len(parts) > MOST_OF_FILE:
            rest = f"{len(parts) - MOST_OF_FILE} more differ"
            shortened.append(SettingDifference(name, "...", "equal", rest))
    return shortened


def _judged(difference: SettingDifference, allow: Sequence[str]) -> SettingDifference:
    names = (difference.path, difference.file, difference.key)
    pattern = next((pattern for pattern in allow if any(name and fnmatchcase(name, pattern) for name in names)), "")
    return replace(difference, allowed=pattern)


def _count(planned: PlannedSettings) -> int:
    """How many values were compared: one a file that is no header, one a key of a header."""
    return len(planned.files) + sum(len(keys) for keys in planned.headers.values())


def _verdict(differences: Sequence[SettingDifference], compared: int) -> Gate:
    red = [difference for difference in differences if not difference.allowed]
    accepted = len(differences) - len(red)
    checks = (Metric("settings", compared), Metric("settings allowed", accepted)) if accepted else (
        Metric("settings", compared),
    )  # fmt: skip
    if not red:
        return Gate("settings", "met", checks)
    more = f" and {len(red) - 1} more" if len(red) > 1 else ""
    cause = f"{red[0].path} is not as planned{more}"
    return Gate("settings", "missed", checks, str(red[0]), cause)
