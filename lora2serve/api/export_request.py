"""Everything that an export is asked for, in one typed value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from lora2serve.artifacts.manifest import ADAPTER_TARGETS
from lora2serve.config.arguments import take_fields
from lora2serve.config.model_name import refuse_name
from lora2serve.config.sizes import parse_size
from lora2serve.errors import UsageError
from lora2serve.exporting.open_model import MergeBase, OpenOptions
from lora2serve.exporting.shared_export import WorkerPlace
from lora2serve.system.small_files import plain_path

DType = Literal["bf16", "fp16", "fp32"]
Combine = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties"]
OllamaKind = Literal["model", "adapter"]
Named = str | Path
N = TypeVar("N", bound=Named)
OLLAMA_TARGETS = ("ollama", "ollama-adapter")
SIZES = ("shard_size", "split_size")
# Options of single targets, by the names of the fields that those targets have for them.
OF_TARGETS = ("tensor_type", "pre", "match_reference", "imatrix", "served_base", "as_lora_rank", "from_model", *SIZES)


@dataclass(frozen=True)
class ExportRequest:
    """The arguments of ``lora2serve.export``, which has them explained."""

    sources: tuple[Named, ...]
    targets: tuple[str, ...]
    quants: tuple[str, ...] = ()
    out: Path | None = None
    overwrite: bool = False
    base: Named | None = None
    merge_base: MergeBase = "auto"
    dtype: DType | None = None
    adapters: tuple[Named, ...] = ()
    combine: Combine | None = None
    weights: tuple[float, ...] = ()
    density: float = 0.5
    allow_base_mismatch: bool = False
    allow_pickle: bool = False
    name: str | None = None
    calibrate: Named | None = None
    shard_size: str | int | None = None
    tensor_type: tuple[str, ...] = ()
    pre: str | None = None
    match_reference: bool = False
    imatrix: Path | None = None
    split_size: str | int | None = None
    served_base: str | None = None
    as_lora_rank: int | None = None
    as_kind: OllamaKind | None = None
    from_model: str | None = None
    create: str | None = None
    install: bool = False
    shards: str | None = None

    def __post_init__(self) -> None:
        """UsageError for values that no type checker has seen, and for what contradicts itself."""
        take_fields(self)
        if self.out:
            object.__setattr__(self, "out", plain_path(self.out))
        if self.as_lora_rank is not None and self.as_lora_rank < 1:
            raise UsageError(f"as_lora_rank: {self.as_lora_rank}, expected a whole number from 1 on")
        if self.name is not None:
            refuse_name(self.name, "--name")
        if self.weights and not self.combine:
            raise UsageError("--weights: only with --combine")
        if self.as_kind and "ollama" not in self.targets:
            raise UsageError(f"--as {self.as_kind}: only for --target ollama")
        if self.shards is not None:
            WorkerPlace.parse(self.shards)
        if self.from_model and "ollama-adapter" not in self.target_names():
            raise UsageError("--from: only for --target ollama --as adapter", "--base names the model to fold onto")

    def target_names(self) -> tuple[str, ...]:
        """The targets, each once; with ``as_kind`` "adapter", Ollama's is the adapter's."""
        renamed = {"ollama": "ollama-adapter"} if self.as_kind == "adapter" else {}
        return tuple(dict.fromkeys(renamed.get(target, target) for target in self.targets))

    def open_options(self) -> OpenOptions:
        """How the model is opened."""
        folds = bool(self.as_lora_rank) or any(target not in ADAPTER_TARGETS for target in self.target_names())
        return OpenOptions(self.merge_base, self.dtype, self.allow_base_mismatch, self.name, folds)

    def target_options(self) -> dict[str, Any]:
        """The options of single targets that are set, for whichever target has them."""
        options = {name: getattr(self, name) for name in OF_TARGETS}
        options = {name: value for name, value in options.items() if value not in (None, False, ())}
        options |= {name: parse_size(options[name]) for name in SIZES if isinstance(options.get(name), str)}
        if self.install:
            from lora2serve.serving import lmstudio_app

            options |= {"install": lmstudio_app.models_folder(), "replace": self.overwrite}
        return options


def several(values: N | Sequence[N]) -> tuple[N, ...]:
    """One or several names, paths or words, as a tuple."""
    return (values,) if isinstance(values, str | Path) else tuple(values)


def accepts(options: type[Any]) -> set[str]:
    """The names of a target's options."""
    return {field.name for field in fields(options)}
