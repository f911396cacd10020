"""LM Studio: the GGUF where it looks for it, ``publisher/model/file.gguf`` below its models folder."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from converters.gguf import gguf_settings
from converters.gguf.gguf_sink import GgufOptions, GgufSink
from converters.gguf.nested_dir import NestedDir
from lora2serve.artifacts.staging import StagedDir
from lora2serve.errors import ExportError
from lora2serve.exporting.settings_plan import PlannedSettings
from lora2serve.exporting.sinks import ExportFacts, ExportModel
from lora2serve.weights.tensors import Block, TensorSpec

DEFAULT_PUBLISHER = "lora2serve"
FORBIDDEN_CHARACTERS = set('/<>:"\\|?*')


@dataclass(frozen=True)
class LmStudioOptions(GgufOptions):
    """Those of the GGUF, and ``publisher``: the first of the two folders. ``install``: LM Studio's folder of models,
    where the file must not be yet, unless it is to be replaced.
    """

    publisher: str = DEFAULT_PUBLISHER
    install: Path | None = None
    replace: bool = field(default=False, metadata={"record": False})  # says nothing of the export


class LmStudioSink:
    """LM Studio sees a file only two folders deep (lmstudio.ai/docs, "sideload"); it takes merged models only."""

    Options: ClassVar[type[LmStudioOptions]] = LmStudioOptions
    quants: ClassVar[tuple[str, ...]] = GgufSink.quants
    default_quant: ClassVar[str | None] = GgufSink.default_quant

    def __init__(self, model: ExportModel, out: StagedDir, options: LmStudioOptions) -> None:
        for name in (options.publisher, model.name):
            _refuse_name(name)
        self._out, self._folder = out, _folder(model, options)
        self._gguf = GgufSink(model, NestedDir(out, self._folder), options)
        installed = [options.install / self._folder / name for name in self._gguf.files] if options.install else []
        for path in (path for path in installed if os.path.lexists(path) and not options.replace):
            raise ExportError(f"{path}: LM Studio has that file", "--overwrite replaces it, or give another --name")
        self.wanted = self._gguf.wanted

    def write(self, spec: TensorSpec, rows: slice, block: Block) -> None:
        self._gguf.write(spec, rows, block)

    def finish(self) -> ExportFacts:
        file = f"{self._folder}/{self._gguf.files[0]}"
        path = shlex.quote(str(self._out.target / file))
        return replace(self._gguf.finish(), file=file, use=f"lms import --copy --user-repo {self._folder} {path}")

    def close(self) -> None:
        self._gguf.close()


def plan_settings(model: ExportModel, options: LmStudioOptions) -> PlannedSettings:
    """Those of the GGUF, in its folder."""
    return gguf_settings.plan_settings(model, options).inside(_folder(model, options))


def _folder(model: ExportModel, options: LmStudioOptions) -> str:
    return f"{options.publisher}/{model.name}"


def _refuse_name(name: str) -> None:
    """What ``lms import`` takes for a folder's name (``isValidFolderName`` in its importCmd.ts)."""
    if (
        not 0 < len(name) <= 100
        or name != name.strip()
        or name[0] == "."
        or name[-1] == "."
        or set(name) & FORBIDDEN_CHARACTERS
    ):
        raise ExportError(f"{name!r}: not a folder name that LM Studio takes", "give another with --name")
