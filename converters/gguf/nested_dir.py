"""A folder inside another output."""

from __future__ import annotations

from pathlib import Path

from lora2serve.artifacts.staging import StagedDir, StagedFile


class NestedDir(StagedDir):
    """A folder inside another output."""

    def __init__(self, out: StagedDir, name: str) -> None:
        self._out, self._name = out, name
        self.target, self.path = out.target / name, Path(out.path / name)

    def file(self, name: str, size: int) -> StagedFile:
        return self._out.file(f"{self._name}/{name}", size)
