"""Everything that an export is asked for, in one typed value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

from lora2serve.artifacts.manifest import ADAPTER_TARGETS
from lora2serve.config.model_name import refuse_name
from lora2serve.config.schema import show
from lora2serve.config.sizes import parse_size
from lora2serve.errors import UsageError
from lora2serve.exporting.open_model import MergeBase, OpenOptions
from lora2serve.exporting.shared_export import WorkerPlace
from lora2serve.system.small_files import plain_path

DType = Literal["bf16", "fp16", "fp32"]
Combine = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties"]
OllamaKind = Literal["model", "adapter"]
Named = str | Path
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
        if self.out:
            object.__setattr__(self, "out", plain_path(self.out))
        choices = {"merge_base": MergeBase, "dtype": DType, "combine": Combine, "as_kind": OllamaKind}
        for name, kind in choices.items():
            value = getattr(self, name)
            if value is not None and value not in get_args(kind):
                raise UsageError(f"{name}: {value!r}, expected one of {', '.join(get_args(kind))}")
        self._check_kinds()
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

    def _check_kinds(self) -> None:
        """Texts are true, and a 0 is taken for nothing given, where nobody looks."""
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type == "bool" and not isinstance(value, bool):
                raise UsageError(f"{each.name}: {show(value)}, expected True or False")
        if self.name is not None and not isinstance(self.name, str):
            raise UsageError(f"name: {show(self.name)}, expected a text")
        numbers = {"weights": self.weights, "density": (self.density,)}
        for name, values in numbers.items():
            wrong = [value for value in values if isinstance(value, bool) or not isinstance(value, Real)]
            if wrong:
                raise UsageError(f"{name}: {show(wrong[0])}, expected a number")
        rank = self.as_lora_rank
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1):
            raise UsageError(f"as_lora_rank: {show(rank)}, expected a whole number from 1 on")

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


def several(values: Named | Sequence[Named], argument: str) -> tuple[Named, ...]:
    """One or several names or paths, as a tuple; UsageError, which names the argument, for anything else."""
    items = (values,) if isinstance(values, str | Path) or not isinstance(values, Iterable) else tuple(values)
    wrong = [item for item in items if not isinstance(item, str | Path)]
    if wrong:
        raise UsageError(f"{argument}: {show(wrong[0])}, expected a name or a path, or a list of them")
    return items


def words(values: str | Sequence[str], argument: str) -> tuple[str, ...]:
    """One or several words, as a tuple; UsageError, which names the argument, for anything else."""
    items = (values,) if isinstance(values, str) or not isinstance(values, Iterable) else tuple(values)
    wrong = [item for item in items if not isinstance(item, str)]
    if wrong:
        raise UsageError(f"{argument}: {show(wrong[0])}, expected a word or a list of words")
    return items


def accepts(options: type[Any]) -> set[str]:
    """The names of a target's options."""
    return {field.name for field in fields(options)}
