"""A LoRA adapter as GGUF, for llama.cpp's ``--lora`` and Ollama's ADAPTER.

llama.cpp scales by alpha / rank of the whole file (``src/llama-adapter.cpp``), and not at all where alpha is 0. So each
module's own scale goes into its B, and alpha is 0: rsLoRA and the rank and alpha patterns come out right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from converters.gguf import expert_factors, header
from converters.gguf.expert_factors import ExpertTargets
from converters.gguf.gguf_settings import TENSORS, settings
from converters.gguf.header import Keys
from converters.gguf.row_map import RowMap, RowMaps
from lora2serve.adapters.adapter import Adapter, open_adapter
from lora2serve.artifacts.staging import StagedDir
from lora2serve.config.lora_inits import changes_base, init_of
from lora2serve.errors import ExportError
from lora2serve.exporting.settings_plan import PlannedSettings
from lora2serve.exporting.sinks import ExportFacts, ExportModel
from lora2serve.system import scratch
from lora2serve.weights.tensors import Block, TensorSpec

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor

LORA_MATRICES = {"lora_A", "lora_B"}


@dataclass(frozen=True)
class GgufAdapterOptions:
    """None."""


class GgufAdapterSink:
    """One small GGUF of ``general.type`` adapter, float32."""

    Options: ClassVar[type[GgufAdapterOptions]] = GgufAdapterOptions
    quants: ClassVar[tuple[str, ...]] = ()
    default_quant: ClassVar[str | None] = None

    def __init__(self, model: ExportModel, out: StagedDir, options: GgufAdapterOptions) -> None:
        self.wanted: Mapping[str, int] = {}  # the base is no part of the product
        if model.adapter is None or len(model.lineage.adapters) > 1:
            raise ExportError("--target gguf-adapter: expected one adapter", "combine them with --combine")
        self._adapter = open_adapter(model.adapter)
        with RowMaps(model) as row_maps:
            self._architecture = row_maps.architecture
            stored = {module: model.source.tensor_of(f"{module}.weight") for module in self._adapter.layers}
            self._experts = expert_factors.find_targets(model, row_maps)
            self._row_maps = {
                module: row_maps.of(name) if name else []
                for module, name in stored.items()
                if name not in self._experts.rows
            }
        _refuse(self._adapter, self._row_maps, self._experts, model)
        self._out, self.name = out, file_name(model)
        self._file = out.file(self.name, self._planned_size())

    def write(self, spec: TensorSpec, rows: slice, block: Block) -> None:
        """Never called: nothing is wanted of the merged model."""

    def finish(self) -> ExportFacts:
        with scratch.temporary_folder("adapter") as folder:
            path = Path(folder) / self.name
            self._write_file(path)
            self._file.pwrite(path.read_bytes(), 0)
        use = f"llama-server -m BASE.gguf --lora {self._out.target / self.name}"
        return ExportFacts(use=use, architecture=self._architecture, file=self.name)

    def close(self) -> None:
        pass

    def _planned_size(self) -> int:
        """Bytes of the file, from the shapes alone: its header is written to a scratch file, no weight is read."""
        import numpy as np

        with scratch.temporary_folder("adapter") as folder:
            path = Path(folder) / self.name
            writer, tensor_bytes = self._writer(path), 0
            for name, shape in self._shapes().items():
                count = 4 * prod(shape)
                writer.add_tensor_info(name, shape, np.dtype(np.float32), count)
                tensor_bytes += writer.ggml_pad(count, writer.data_alignment)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            return int(writer.ggml_pad(path.stat().st_size, writer.data_alignment)) + tensor_bytes

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of the file's tensors, by their names."""
        found: dict[str, tuple[int, ...]] = {}
        for target, parts in _by_target(self._row_maps).items():
            shapes = [self._adapter.layers[module].parts["lora_A"].shape for module in parts]
            rank, rows = sum(shape[0] for shape in shapes), len(next(iter(parts.values())).outputs)
            found |= {f"{target}.lora_a": (rank, shapes[0][1]), f"{target}.lora_b": (rows, rank)}
        for target, (a, b) in self._experts.shapes().items():
            found |= {f"{target}.lora_a": a, f"{target}.lora_b": b}
        return found

    def _writer(self, path: Path) -> GGUFWriter:
        return header.open_writer(path, _keys(self._architecture))

    def _write_file(self, path: Path) -> None:
        writer = self._writer(path)
        for target, parts in _by_target(self._row_maps).items():
            a, b = self._factors(parts)
            writer.add_tensor(f"{target}.lora_a", a.numpy())
            writer.add_tensor(f"{target}.lora_b", b.numpy())
        for target, a, b in self._experts.factors():
            writer.add_tensor(f"{target}.lora_a", a.numpy())
            writer.add_tensor(f"{target}.lora_b", b.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _factors(self, parts: Mapping[str, RowMap]) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) of one tensor, the scale in B; modules that were fused lie side by side."""
        import torch

        above, beside = [], []
        for module, row_map in parts.items():
            outputs, inputs = row_map.outputs, row_map.inputs
            layer = self._adapter.layers[module].parts
            a, b = (layer[kind].read() for kind in ("lora_A", "lora_B"))
            above.append(a if inputs is None else a[:, inputs])
            ordered = b[outputs.clamp(min=0)] * (outputs >= 0)[:, None]
            beside.append(ordered * self._adapter.scale(module, a.shape[0]))
        return torch.cat(above).contiguous(), torch.cat(beside, dim=1).contiguous()


def file_name(model: ExportModel) -> str:
    """Of the adapter's file."""
    return f"{model.name}-lora.gguf"


def plan_settings(model: ExportModel, options: GgufAdapterOptions) -> PlannedSettings:
    """The keys of the file; which tensors it has is for the tensor gate."""
    with RowMaps(model) as row_maps:
        keys = settings(_keys(row_maps.architecture), ())
    name = file_name(model)
    facts = ExportFacts(architecture=row_maps.architecture, file=name)
    return PlannedSettings({}, {name: keys}, (name,), facts, {f"{name}:{TENSORS}*": "compared with the tensors"})


def _keys(architecture: str) -> Keys:
    from gguf import GGUFWriter

    writer = GGUFWriter(None, architecture)  # it collects the keys; nothing is written
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    return header.collected(writer)


def _by_target(row_maps: Mapping[str, Sequence[RowMap]]) -> dict[str, dict[str, RowMap]]:
    """GGUF tensor -> the modules that lie in it, and their outputs and inputs there."""
    targets: dict[str, dict[str, RowMap]] = defaultdict(dict)
    for module, maps in row_maps.items():
        for row_map in maps:
            targets[row_map.target][module] = row_map
    return targets


def _refuse(
    adapter: Adapter, row_maps: Mapping[str, Sequence[RowMap]], experts: ExpertTargets, model: ExportModel
) -> None:
    """Everything that the format cannot hold, at once."""
    problems = [f"{name} was trained in full" for name in adapter.full if not _is_copy(name, adapter, model)]
    if not adapter.is_lora:
        problems.append(f"{adapter.method} is not LoRA")
    if changes_base(init_of(adapter.config)):
        problems.append("its init took a part of the base into the adapter")
    for module, layer in adapter.layers.items():
        extra = sorted(set(layer.parts) - LORA_MATRICES)
        if extra:
            problems.append(f"{module}: {', '.join(extra)} does not fit into a GGUF adapter")
        elif not row_maps.get(module) and not experts.hold(layer.parts["lora_A"].name):
            problems.append(f"{module}: no such tensor in the GGUF of this model, or none with its rows and columns")
    if problems:
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise ExportError(
            "\n".join([f"{adapter.path}: {text}" for text in problems[:10]] + more), "export --target gguf merges it"
        )


def _is_copy(name: str, adapter: Adapter, model: ExportModel) -> bool:
    """PEFT saves the base's embedding and head along when they carry a LoRA."""
    import torch

    stored = model.source.tensor_of(name)
    return stored is not None and torch.equal(model.source.before(stored).values.float(), adapter.full[name].read())
