"""A published export: its directory and its manifest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from lora2serve.artifacts.manifest import Manifest, ParityVerdict
from lora2serve.artifacts.version_marker import is_of_version, read_marker
from lora2serve.errors import InputError

MEMBERS = "adapters"  # folder of a bundle


@dataclass(frozen=True)
class Export:
    """What ``export`` made, or a bundle; ``open`` reads it again."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Self:
        """The export at ``path``; InputError if it is none."""
        return cls(path, Manifest.read(path))

    @property
    def target(self) -> str:
        return self.manifest.target

    @property
    def quant(self) -> str | None:
        return self.manifest.quant

    @property
    def name(self) -> str:
        """``gguf-Q4_K_M``: the target and the type."""
        return self.manifest.export_name

    @property
    def served_name(self) -> str:
        """What requests call it: of a version in a registry ``medical-qa-7``, else the name it was exported with."""
        home = self.path.resolve().parent.parent
        if is_of_version(home):
            name, number = read_marker(home)
            return f"{name}-{number}"
        return self.manifest.name or self.path.name

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return self.manifest.bytes

    @property
    def gguf(self) -> Path:
        """Its GGUF, the first where it is split; InputError where it has none."""
        files = sorted(
            file for file in self.path.rglob("*.gguf") if file.is_file() and not file.name.startswith("mmproj-")
        )
        if not files:
            raise InputError(f"{self.path}: no .gguf in it", "export again")
        return files[0]

    @property
    def members(self) -> dict[str, Path]:
        """The adapter exports in a bundle by name."""
        return {name: self.path / MEMBERS / name for name in self.manifest.bundle}

    def verify(self) -> list[str]:
        """Everything in which it differs from its manifest, one line each."""
        return self.manifest.verify(self.path)

    def with_parity(self, verdict: ParityVerdict) -> Self:
        """The export with that verdict in its manifest, on disk too."""
        manifest = replace(self.manifest, parity=verdict)
        manifest.write(self.path)
        return replace(self, manifest=manifest)
