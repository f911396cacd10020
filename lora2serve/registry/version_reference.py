"""``NAME@7``, ``NAME@champion`` and ``NAME@champion/vllm``: how a version and an export of it are named."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from lora2serve.config.model_name import refuse_run_name
from lora2serve.errors import UsageError

REFERENCE = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)@(?P<version>[A-Za-z0-9][A-Za-z0-9._-]*)(?:/(?P<export>[^/]+))?"
)
ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
LONGEST_ALIAS = 100  # characters


@dataclass(frozen=True)
class VersionReference:
    """``number`` or ``alias`` is set; ``export`` where one export of it is meant."""

    name: str
    number: int | None = None
    alias: str = ""
    export: str = ""

    def __str__(self) -> str:
        chosen = self.alias or self.number
        return f"{self.name}@{chosen}" + (f"/{self.export}" if self.export else "")


def parse_reference(text: str) -> VersionReference | None:
    """The reference; None for what has not that form."""
    match = REFERENCE.fullmatch(text)
    if match is None:
        return None
    name, version, export = match["name"], match["version"], match["export"] or ""
    if version.isdecimal():
        return VersionReference(name, int(version[:18]), export=export)
    return VersionReference(name, alias=version, export=export) if ALIAS.fullmatch(version) else None


def need_reference(text: str) -> VersionReference:
    """The reference; UsageError for what is none."""
    reference = parse_reference(text)
    if reference is None:
        raise UsageError(f"{text}: expected NAME@NUMBER or NAME@ALIAS", "such as medical-qa@7 or medical-qa@champion")
    return reference


def need_version(text: str) -> VersionReference:
    """The reference to a whole version; UsageError for one to an export of it, too."""
    reference = need_reference(text)
    if reference.export:
        whole = str(replace(reference, export=""))
        raise UsageError(f"{text}: names the export {reference.export}, expected a version", f"such as {whole}")
    return reference


def refuse_version_name(name: str) -> None:
    """UsageError for what cannot name versions: it becomes part of paths and of references."""
    refuse_run_name(name, "--name")


def refuse_alias(alias: str) -> None:
    """UsageError for what cannot be an alias: it would be taken for a number, or for more than a word."""
    if not ALIAS.fullmatch(alias) or len(alias) > LONGEST_ALIAS:
        shown = repr(alias) if alias.isprintable() and len(alias) <= LONGEST_ALIAS else ascii(alias)[:60]
        raise UsageError(
            f"alias {shown}: expected letters, digits, '.', '_' and '-', a letter first", "such as champion or staging"
        )
