"""What a target is: a class whose instances are sinks, found by a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lora2serve.adapters.deltas import Delta
from lora2serve.artifacts.lineage import Lineage
from lora2serve.artifacts.manifest import Manifest, TemplateRecord
from lora2serve.errors import UsageError, did_you_mean
from lora2serve.exporting.answer_end import read_answer_end
from lora2serve.progress import Progress
from lora2serve.system.small_files import JsonObject
from lora2serve.weights.tensors import ALL, Block, Source, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from lora2serve.artifacts.staging import StagedDir
    from lora2serve.merge.survival import Survival

# A name stays a string until it is used: the toolchain imports no output format by itself.
BUILTIN = {
    "vllm": "converters.vllm.vllm_sink:VllmSink",
    "gguf": "converters.gguf.gguf_sink:GgufSink",
    "ollama": "converters.ollama.ollama_sink:OllamaSink",
    "ollama-adapter": "converters.ollama.ollama_adapter:OllamaAdapterSink",
    "lmstudio": "converters.lmstudio:LmStudioSink",
    "adapter": "converters.adapter:AdapterSink",
    "gguf-adapter": "converters.gguf.gguf_adapter:GgufAdapterSink",
}
# What reads an export back, for parity's tensor gate.
READERS = {
    "vllm": "converters.vllm.vllm_sink:open_reader",
    "gguf": "converters.gguf.gguf_reader:GgufReader",
    "ollama": "converters.gguf.gguf_reader:GgufReader",
    "lmstudio": "converters.gguf.gguf_reader:GgufReader",
    "gguf-adapter": "converters.gguf.gguf_adapter_reader:GgufAdapterReader",
    "ollama-adapter": "converters.gguf.gguf_adapter_reader:GgufAdapterReader",
}
CALIBRATOR = "converters.gguf.imatrix_calibration:calibrate"  # makes an importance matrix
OLLAMA_REQUEST = "converters.ollama.create_request:request"  # an export as Ollama's /api/create wants it
GROUP = "lora2serve.exporters"


class ModelSource(Source, Protocol):
    """A merged model that still knows its base: ``lora2serve.merge.merged.Merged``."""

    @property
    def config(self) -> JsonObject:
        """config.json of the merged model, without a quantization_config."""
        ...

    @property
    def survival(self) -> Survival:
        """How much of each change is left after the cast, of what was read so far."""
        ...

    def changed(self) -> list[str]:
        """The names of the tensors that an adapter changes."""
        ...

    def deltas(self, name: str) -> Sequence[Delta]:
        """What the adapters do to one tensor, in order."""
        ...

    def tensor_of(self, parameter: str) -> str | None:
        """The merged tensor that a parameter of the trained model is; None where there is no such one."""
        ...

    def module_in_base(self, module: str) -> str:
        """The base's own name for a module of the trained model, where that was another class."""
        ...

    def before(self, name: str, rows: slice = ALL) -> Block:
        """Rows of the base that one tensor starts from."""
        ...


@dataclass(frozen=True)
class ExportModel:
    """What a sink plans from. Opening one reads headers and small files, never a weight."""

    source: ModelSource
    files: Mapping[str, Path]  # tokenizer, chat template, generation config, license: file name -> path
    name: str  # short name for files and cards, such as "demo"
    base: str  # repo id or path of the base, as the user named it
    adapter: Path | None = None  # the PEFT directory that was folded in, if any
    dtype: str | None = None  # --dtype, where it was chosen
    lineage: Lineage = field(default_factory=Lineage)  # goes into the manifest

    @property
    def config(self) -> JsonObject:
        """The source's config.json."""
        return self.source.config

    @cached_property
    def answer_end(self) -> tuple[str, int] | None:
        """Text and id of the token with which the chat template closes an answer; None where there is none."""
        return read_answer_end(self.files)


@dataclass(frozen=True)
class Calibration:
    """Data that a target measures activations on, tokenized when it asks, and how its long work speaks."""

    source: str  # as the user named it
    rows: Callable[[], Sequence[Sequence[int]]]  # token ids; DataError where it cannot be read
    progress: Progress


@dataclass(frozen=True)
class ExportFacts:
    """What a format says of its export in the manifest, where the fields of that name are explained."""

    use: str | None = None
    dtype: str | None = None
    architecture: str | None = None
    file: str | None = None
    projector: str | None = None
    match_reference: bool = False
    tokens_proven: int | None = None
    template: TemplateRecord | None = None
    from_model: str | None = None
    rank: int | None = None
    served_base: str | None = None
    details: Mapping[str, object] = field(default_factory=dict)  # keys of this format alone
    warnings: tuple[str, ...] = ()  # said once; no part of the manifest


class Sink(Protocol):
    """One open output. Its constructor plans everything and refuses before the first byte.

    ``wanted`` maps the name of each tensor it needs to how many rows must come together: 1 when any
    block of rows will do, the head size where heads are permuted, ``spec.rows`` for the whole tensor.
    ``write`` may be called from several threads for different blocks, in any order.
    """

    wanted: Mapping[str, int]

    def write(self, spec: TensorSpec, rows: slice, block: Block) -> None:
        """Take rows ``[start, stop)`` of one wanted tensor; must not change them."""
        ...

    def finish(self) -> ExportFacts:
        """Write the side files; return what the manifest should say about this format."""
        ...

    def close(self) -> None:
        """Release handles. Safe twice, and after an error."""
        ...


class Reader(Protocol):
    """An export, opened by its format's own library. Made from ``(directory, manifest, model)``."""

    @property
    def wanted(self) -> Mapping[str, int]:
        """As a sink's."""
        ...

    @property
    def differences(self) -> Sequence[str]:
        """Names that were planned and are absent, or are there and were not planned."""
        ...

    def pair(self, spec: TensorSpec, rows: slice, block: Tensor) -> tuple[str, Tensor, Tensor]:
        """The stored tensor's name, the planned values of the rows, and the stored ones, both float32 and equal in
        shape. Where the format stores plain floats, the planned ones are rounded to its type.
        """
        ...

    def again(self, spec: TensorSpec, rows: slice, block: Tensor) -> Tensor | None:
        """The planned rows as this machine's quantizer stores them in the type of the stored ones, in the shape of
        ``pair``; None where they are not quantized, or not by a rule that needs no data.
        """
        ...


class Exporter(Protocol):
    """A target's class: ``Options`` is a frozen dataclass whose fields are the target's options.

    ``quants`` are the accepted names for ``--quant``, canonical spelling; a target that has none
    leaves it empty. Where it is not empty, ``Options`` has a field ``quant``.
    """

    Options: ClassVar[type[Any]]
    quants: ClassVar[tuple[str, ...]]
    default_quant: ClassVar[str | None]

    def __call__(self, model: ExportModel, out: StagedDir, options: Any) -> Sink: ...


def target_names() -> list[str]:
    """What users can name: the built-in targets, then those of installed packages."""
    builtin = [name for name in BUILTIN if name != "ollama-adapter"]  # for users: --target ollama --as adapter
    return [*builtin, *(point.name for point in entry_points(group=GROUP) if point.name not in BUILTIN)]


def find(name: str) -> Exporter:
    """The exporter of that name, imported now."""
    if name in BUILTIN:
        exporter: Exporter = resolve_name(BUILTIN[name])
        return exporter
    for point in entry_points(group=GROUP, name=name):
        loaded: Exporter = point.load()
        return loaded
    raise UsageError(
        f"--target {name}: unknown target{did_you_mean(name, target_names())}",
        f"known targets: {', '.join(target_names())}",
    )


def find_reader(target: str) -> Callable[[Path, Manifest, ExportModel], Reader] | None:
    """The reader for a target's exports, imported now; None where there is none."""
    if target not in READERS:
        return None
    reader: Callable[[Path, Manifest, ExportModel], Reader] = resolve_name(READERS[target])
    return reader


def plan_options(
    targets: Mapping[str, Exporter], quants: Sequence[str], requested: JsonObject
) -> list[tuple[str, Any]]:
    """One ``(target, options)`` for each output to write.

    Each of ``quants`` goes to every target that knows it, each option in ``requested`` to every target
    that has such a field. What fits no target is an error that names it.
    """
    _refuse_homeless(targets, quants, requested)
    planned = []
    for name, exporter in targets.items():
        own = {f.name for f in fields(exporter.Options)}
        options = {key: value for key, value in requested.items() if key in own}
        if not exporter.quants:
            planned.append((name, exporter.Options(**options)))
            continue
        spelled = {quant.lower(): quant for quant in exporter.quants}
        chosen: list[str | None] = [*dict.fromkeys(spelled[q.lower()] for q in quants if q.lower() in spelled)]
        for quant in chosen or [exporter.default_quant]:
            planned.append((name, exporter.Options(quant=quant, **options)))
    return planned


def _refuse_homeless(targets: Mapping[str, Exporter], quants: Sequence[str], requested: JsonObject) -> None:
    shown = " ".join(f"--target {name}" for name in targets)
    known_quants = {quant.lower(): quant for exporter in targets.values() for quant in exporter.quants}
    known_options = {f.name for exporter in targets.values() for f in fields(exporter.Options)}
    problems = [
        f"--quant {quant}: unknown for {shown}{_targets_of(quant) or _nearest_quant(quant, known_quants)}"
        for quant in quants
        if quant.lower() not in known_quants
    ]
    unknown = [quant for quant in quants if quant.lower() not in known_quants and not _targets_of(quant)]
    problems += [
        f"--{key.replace('_', '-')}: not an option of {shown}" for key in requested if key not in known_options
    ]
    if problems:
        hint = f"known types: {', '.join(known_quants.values())}" if known_quants and unknown else ""
        raise UsageError("\n".join(problems), hint)


def _targets_of(quant: str) -> str:
    """The built-in targets that know the type, in words; empty where none does."""
    exporters = {name: find(name) for name in BUILTIN}
    names = [name for name, exporter in exporters.items() if quant.lower() in map(str.lower, exporter.quants)]
    return f", a type of --target {' or '.join(names)}" if names else ""


def _nearest_quant(quant: str, known: Mapping[str, str]) -> str:
    """The nearest type as it is written, whatever the case of what was typed."""
    near = did_you_mean(quant.lower(), known)
    return next((near.replace(repr(low), repr(name)) for low, name in known.items() if repr(low) in near), near)
