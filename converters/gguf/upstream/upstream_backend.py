"""Every other architecture: planned by llama.cpp's own converter, written by us.

Its classes say which tensors there are, what is done to them and what the metadata is; they get our merged tensors, not
files. Rows that a class leaves as they are go straight from the fold to the quantiser, block by block; what it computes
is computed by it, one tensor at a time.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.gguf.native import metadata, pretokenizer, vocab
from converters.gguf.native.native_layout import Place, rows_of, together
from converters.gguf.presets import PLAIN, PRESETS, Planned
from converters.gguf.upstream.converter_process import ConverterProcess
from lora2serve.errors import ExportError
from lora2serve.exporting.sinks import ExportModel
from lora2serve.weights.tensors import FLOATS, TensorSpec, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


class Upstream:
    """One GGUF file as llama.cpp's converter lays it out: the model's, or that of its ``projector``."""

    def __init__(self, model: ExportModel, options: Any, tree: Path, *, projector: bool = False) -> None:
        self._model, self._options, self._projector = model, options, projector
        self._specs = {spec.name: spec for spec in model.source.specs()}
        self.preset = options.quant if options.quant in PLAIN or not projector else "F16"
        with _folder(model) as folder:
            self._talk = ConverterProcess(tree, self._question(folder), self._read)
            plan = self._talk.plan()
        self.architecture: str = plan["architecture"]
        self._keys = plan["keys"]
        self.tensors: Sequence[Planned] = [_planned(found) for found in plan["tensors"]]
        self.places: dict[str, list[Place]] = defaultdict(list)  # of tensors whose rows stay as they are
        self._made: dict[str, list[str]] = defaultdict(list)  # the last source of a computed tensor -> the tensor
        self._rest: dict[str, Any] = {}
        self._sort(plan["tensors"])
        self.wanted: Mapping[str, int] = {
            name: max(1, spec.rows) if name in self._made else together(spec, self.places[name])
            for name, spec in self._specs.items()
            if name in self._made or name in self.places
        }

    def targets(self, spec: TensorSpec, rows: slice, block: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """(tensor, first row, rows) for each part of the file that a block of stored rows completes."""
        values = self._given(spec.name, block)
        for place in self.places.get(spec.name, ()):
            yield place.target, *rows_of(place, spec, rows, values)
        for target in self._made.get(spec.name, ()):
            made = self._talk.make(target, {spec.name: values})
            yield target, 0, made.reshape(-1, made.shape[-1])

    def rest(self) -> Iterator[tuple[str, Tensor | bytes]]:
        """What comes from no stored tensor: values, or bytes in the file's own type."""
        import torch

        for target, known in self._rest.items():
            if isinstance(known, bytes):
                yield target, known
                continue
            values = self._talk.make(target, {}) if known is None else torch.from_numpy(known)
            yield target, values.reshape(-1, values.shape[-1])

    def new_writer(self, path: Path) -> Any:
        """A GGUFWriter with all metadata and no tensors."""
        from gguf import GGUFValueType, GGUFWriter

        writer = GGUFWriter(path, self.architecture)
        writer.kv_data[0].clear()
        own = self._own_keys()
        for key, value, kind, inner in self._keys:
            if key not in own and not (key.startswith("general.base_model.") and "general.base_model.count" in own):
                writer.add_key_value(key, value, GGUFValueType(kind), None if inner is None else GGUFValueType(inner))
        for key, value in own.items():
            metadata.add_key(writer, key, value)
        return writer

    def close(self) -> None:
        """End the child."""
        self._talk.close()

    def _own_keys(self) -> dict[str, Any]:
        """What we know better: the name, the type, where the file comes from."""
        own = {
            "general.name": vocab.name_for_llama_cpp(self._model),
            "general.file_type": PRESETS[self.preset],
            **metadata.lineage_keys(self._model),
        }
        if self._options.chat_template is not None and not self._projector:
            own["tokenizer.chat_template"] = self._options.chat_template
        return own

    def _question(self, folder: Path) -> dict[str, Any]:
        return {
            "architecture": self._model.config["architectures"][0],
            "folder": str(folder),
            "projector": self._projector,
            "file_type": self.preset if self.preset in PLAIN else "F16",
            "pre": self._options.pre,
            "pre_found": _pre_tokenizer(self._model),
            "specs": [(spec.name, spec.shape, self._told(spec)) for spec in self._specs.values()],
        }

    def _told(self, spec: TensorSpec) -> str:
        """The torch type that the child gets a tensor in: upstream computes in float32, but keeps float16."""
        if spec.dtype in FLOATS:
            return "float16" if spec.dtype == "F16" and self._options.match_reference else "float32"
        return str(torch_dtype(spec.dtype)).removeprefix("torch.")

    def _given(self, name: str, block: Tensor) -> Tensor:
        """Rows of a stored tensor as the child gets them; as a merged checkpoint would hold them, if asked."""
        import torch

        spec = self._specs[name]
        if self._options.match_reference:
            block = block.to(torch_dtype(spec.dtype))
        return block.to(getattr(torch, self._told(spec)))

    def _read(self, name: str) -> Tensor:
        return self._given(name, self._model.source.read(name).values)

    def _sort(self, tensors: list[dict[str, Any]]) -> None:
        order = {name: number for number, name in enumerate(self._specs)}
        for found in tensors:
            target, shape = found["name"], tuple(found["shape"])
            for source, first in found.get("straight", ()):
                self.places[source].append(Place(target, shape, first))
            if found.get("sources"):
                self._made[max(found["sources"], key=order.__getitem__)].append(target)
            elif not found.get("straight"):
                self._rest[target] = found.get("stored", found.get("constant"))


def _planned(found: Mapping[str, Any]) -> Planned:
    return Planned(found["name"], tuple(found["shape"]), found["kind"], "stored" in found)


def _pre_tokenizer(model: ExportModel) -> str | None:
    """Our own name for the pre-tokenizer, where we have one."""
    path = model.files.get("tokenizer.json")
    try:
        return pretokenizer.pre_tokenizer(path, json.loads(path.read_text(encoding="utf-8"))) if path else None
    except ExportError:
        return None


@contextmanager
def _folder(model: ExportModel) -> Iterator[Path]:
    """The model's directory as upstream wants it, without weights. Its name and its card give metadata."""
    base = (model.lineage.get("base") or {}).get("path")
    card = Path(base) / "README.md" if base else None
    with tempfile.TemporaryDirectory(prefix="lora2serve-model-") as place:
        folder = Path(place) / model.name
        folder.mkdir()
        vocab.fill_tokenizer_directory(folder, model)
        if card is not None and card.is_file():
            (folder / "README.md").symlink_to(card.resolve())
        yield folder
