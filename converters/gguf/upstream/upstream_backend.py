"""Every other architecture: planned by llama.cpp's own converter, written by us.

Its classes say which tensors there are, what is done to them and what the metadata is; they get our merged tensors, not
files. Rows that a class leaves as they are go straight from the fold to the quantizer, block by block; what it computes
is computed by it, one tensor at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from converters.gguf import header, template_copy
from converters.gguf.gguf_layout import LayoutOptions, TensorLayout
from converters.gguf.header import GgufValue, TypedValue
from converters.gguf.native import metadata, pretokenizer, vocab
from converters.gguf.native.native_layout import Placement, rows_needed, rows_of
from converters.gguf.presets import FLOAT_TYPES, PRESETS
from converters.gguf.tokenizer_files import fill_tokenizer_directory, read_tokenizer_json
from converters.gguf.upstream.converter_messages import PlannedTensor, Request
from converters.gguf.upstream.converter_process import ConverterProcess, as_tensor
from lora2serve.errors import ExportError
from lora2serve.exporting.sinks import ExportModel
from lora2serve.system import scratch
from lora2serve.weights.tensors import FLOATS, TensorSpec, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

GRANITE_4 = "GraniteMoeHybridForCausalLM"


class UpstreamBackend:
    """One GGUF file as llama.cpp's converter lays it out: the model's, or that of its ``projector``."""

    def __init__(self, model: ExportModel, options: LayoutOptions, tree: Path, *, projector: bool = False) -> None:
        self._model, self._options, self._projector = model, options, projector
        self._specs = {spec.name: spec for spec in model.source.specs()}
        self.preset = options.quant if options.quant in FLOAT_TYPES or not projector else "F16"
        with _folder(model) as folder:
            self._converter = ConverterProcess(tree, self._question(folder), self._read)
            plan = self._converter.plan()
        self.architecture: str = plan["architecture"]
        self._keys = {key: TypedValue(value, kind, element) for key, value, kind, element in plan["keys"]}
        self.tensors: Sequence[TensorLayout] = [
            TensorLayout(planned["name"], tuple(planned["shape"]), planned["type"], "stored" in planned)
            for planned in plan["tensors"]
        ]
        self.placements: dict[str, list[Placement]] = defaultdict(list)  # of tensors whose rows stay as they are
        self._computed: dict[str, list[str]] = defaultdict(list)  # the last source of a computed tensor -> the tensor
        self._constants: dict[str, PlannedTensor] = {}
        self._sort(plan["tensors"])
        self.wanted: Mapping[str, int] = {
            name: max(1, spec.rows) if name in self._computed else rows_needed(spec, self.placements[name])
            for name, spec in self._specs.items()
            if name in self._computed or name in self.placements
        }

    def keys(self) -> dict[str, TypedValue]:
        """The converter's, but for what we know better."""
        own = self._own_values()
        rebased = "general.base_model.count" in own
        upstream_keys = {
            key: value
            for key, value in self._keys.items()
            if key not in own and not (rebased and key.startswith("general.base_model."))
        }
        return template_copy.as_trained_keys(self._model.files, {**upstream_keys, **header.typed(own)})

    def targets(self, spec: TensorSpec, rows: slice, block: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """(tensor, first row, rows) for each part of the file that a block of stored rows completes."""
        values = self._as_sent(spec.name, block)
        for placement in self.placements.get(spec.name, ()):
            yield placement.target, *rows_of(placement, spec, rows, values)
        for target in self._computed.get(spec.name, ()):
            computed = self._converter.compute(target, {spec.name: values})
            yield target, 0, computed.reshape(-1, computed.shape[-1])

    def constants(self) -> Iterator[tuple[str, Tensor | bytes]]:
        """What comes from no stored tensor: values, or bytes in the file's own type."""
        for target, planned in self._constants.items():
            if "stored" in planned:
                yield target, bytes(planned["stored"])
                continue
            constant = planned.get("constant")
            values = as_tensor(constant) if constant else self._converter.compute(target, {})
            yield target, values.reshape(-1, values.shape[-1])

    def close(self) -> None:
        """End the child."""
        self._converter.close()

    def _own_values(self) -> dict[str, GgufValue]:
        """What we know better: the name, the type, where the file comes from."""
        own: dict[str, GgufValue] = {
            "general.name": vocab.name_for_llama_cpp(self._model),
            "general.file_type": PRESETS[self.preset],
            **metadata.lineage_keys(self._model),
        }
        kind = self._model.config.get("position_embedding_type")
        if (
            self._model.config["architectures"][0] == GRANITE_4
        ):  # upstream goes by the kinds of layers; transformers, by this
            own[f"{self.architecture}.rope.scaling.finetuned"] = kind == "rope"
        if self._options.chat_template is not None and not self._projector:
            own["tokenizer.chat_template"] = self._options.chat_template
        return own

    def _question(self, folder: Path) -> Request:
        return {
            "architecture": self._model.config["architectures"][0],
            "folder": str(folder),
            "projector": self._projector,
            "file_type": self.preset if self.preset in FLOAT_TYPES else "F16",
            "pre": self._options.pre,
            "pre_by_rules": _pre_tokenizer(self._model),
            "specs": [(spec.name, spec.shape, self._sent_dtype(spec)) for spec in self._specs.values()],
        }

    def _sent_dtype(self, spec: TensorSpec) -> str:
        """The torch type that the child gets a tensor in: upstream computes in float32, but keeps float16."""
        if spec.dtype in FLOATS:
            return "float16" if spec.dtype == "F16" and self._options.match_reference else "float32"
        return str(torch_dtype(spec.dtype)).removeprefix("torch.")

    def _as_sent(self, name: str, block: Tensor) -> Tensor:
        """Rows of a stored tensor as the child gets them; as a merged checkpoint would hold them, if asked."""
        import torch

        spec = self._specs[name]
        if self._options.match_reference:
            block = block.to(torch_dtype(spec.dtype))
        return block.to(getattr(torch, self._sent_dtype(spec)))

    def _read(self, name: str) -> Tensor:
        return self._as_sent(name, self._model.source.read(name).values)

    def _sort(self, tensors: Sequence[PlannedTensor]) -> None:
        order = {name: number for number, name in enumerate(self._specs)}
        for planned in tensors:
            target, shape = planned["name"], tuple(planned["shape"])
            for source, first in planned.get("straight", ()):
                self.placements[source].append(Placement(target, shape, first))
            if planned.get("sources"):
                self._computed[max(planned["sources"], key=order.__getitem__)].append(target)
            elif not planned.get("straight"):
                self._constants[target] = planned


def _pre_tokenizer(model: ExportModel) -> str | None:
    """Our own name for the pre-tokenizer, where we have one."""
    path = model.files.get("tokenizer.json")
    try:
        return pretokenizer.pre_tokenizer(path, read_tokenizer_json(path)) if path else None
    except ExportError:
        return None


@contextmanager
def _folder(model: ExportModel) -> Iterator[Path]:
    """The model's directory as upstream wants it, without weights. Its name and its card give metadata."""
    base = model.lineage.base.path
    card = Path(base) / "README.md" if base else None
    with scratch.temporary_folder("model") as parent:
        folder = Path(parent) / model.name
        folder.mkdir()
        fill_tokenizer_directory(folder, model)
        if card is not None and card.is_file():
            (folder / "README.md").symlink_to(card.resolve())
        yield folder
