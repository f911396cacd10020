"""llama.cpp's own converter in a process of its own: its classes, its ``gguf``, and tensors that the parent hands over.

A worker, loaded by its path with nothing of ours imported. What a class does to a tensor is recorded as it is planned
(its tensors are lazy), and done when the parent asks for the result. Nothing of the checkpoint is read here, and
nothing is written.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from converters.gguf.upstream.converter_messages import FilePlan, Float32Values, PlannedTensor, Request

Node: TypeAlias = Any  # a lazy value of upstream's, or what its function is called with
VISION = "vision_tower.vision_model."
# Classes whose layers upstream tells apart by the names that transformers 4 had for them.
MAMBA_HYBRIDS = ("GraniteMoeHybridForCausalLM", "BambaForCausalLM")
OLDER_LAYER_TYPES = {"full_attention": "attention", "linear_attention": "mamba"}


@dataclass
class Recorded:
    """Stands where upstream has a converted array: the values before it, and the type it was to have.

    ``shape``, ``dtype`` and ``nbytes`` are what upstream's writer asks an array for.
    """

    values: Node
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    nbytes: int = 0


class Parent(Protocol):
    """What this worker needs of its link to the parent."""

    def ask(self, question: object) -> Any:
        """The parent's answer."""
        ...


class UpstreamRefuses(Exception):
    """Upstream's error with the line where it gave up."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConverterWorker:
    """One model of the parent's, seen through one of upstream's classes, from the ``tree`` of its source."""

    def __init__(self, link: Parent, tree: str, request: Request) -> None:
        import torch

        sys.path[:0] = [tree, f"{tree}/gguf-py"]  # the first is where upstream looks for its built-in vocabularies
        self._parent, self._request = link, request
        self._specs = {name: (tuple(shape), dtype) for name, shape, dtype in request["specs"]}
        self._sources: dict[str, Tensor] = {}
        self._lazy_targets: dict[str, Node] = {}
        with _refusals(), torch.inference_mode():
            self._gguf, self._base = import_module("gguf"), import_module("conversion.base")
            self._lazy = self._base.LazyTorchTensor
            self._model = self._open()

    def plan(self) -> FilePlan:
        """Everything of the file but the data of its tensors."""
        import torch

        with _refusals(), torch.inference_mode():
            self._model.prepare_tensors()
            self._model.prepare_metadata(vocab_only=False)
            writer = self._model.gguf_writer
            tensors = [self._describe(name, info) for part in writer.tensors for name, info in part.items()]
            keys = [
                (key, plain(entry.value), int(entry.type), None if entry.sub_type is None else int(entry.sub_type))
                for key, entry in writer.kv_data[0].items()
            ]
            return {"architecture": writer.arch, "keys": keys, "tensors": tensors}

    def compute(self, target: str, sources: Mapping[str, bytearray]) -> Float32Values:
        """The values of one planned tensor, float32; what it needs beside ``sources`` is asked for."""
        import numpy
        import torch

        self._sources = {name: from_bytes(values, *self._specs[name]) for name, values in sources.items()}
        try:
            with _refusals(), torch.inference_mode():
                root = self._lazy_targets[target]
                values = numpy.ascontiguousarray(self._evaluate(root, self._uses(root), {}), numpy.float32)
                return {"shape": list(values.shape), "values": values.data}
        finally:
            self._sources = {}

    def _open(self) -> Any:
        """Upstream's class for the architecture, with our index of tensors and our answer to what is no fact of it."""
        conversion, base = import_module("conversion"), self._base
        file_types = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}
        model_class = conversion.get_model_class(self._request["architecture"], mmproj=self._request["projector"])
        base.ModelBase.index_tensors = self._index_tensors()
        self._gguf.quants.quantize = self._record
        record = self._record
        self._gguf.LazyChunkedTensor.quantize = lambda self, kind: record(self, kind)  # noqa: PLW0108 (it is a method)
        base.TextModel.get_vocab_base_pre = self._pre_tokenizer(base.TextModel.get_vocab_base_pre)
        folder = Path(self._request["folder"])
        file_type = self._gguf.LlamaFileType[file_types[self._request["file_type"]]]
        settings = self._settings(folder)
        model_class.no_mtp = model_class.supports_mtp_export and not self._predicts_more(settings)
        return model_class(folder, file_type, folder / "unwritten.gguf", hparams=settings)

    def _predicts_more(self, settings: Mapping[str, Any]) -> bool:
        """Whether layers that predict more than one token are there: transformers leaves them out when it saves."""
        layers = {**settings, **settings.get("text_config", {})}.get("num_hidden_layers", 0)
        numbers = (re.search(r"\.layers\.(\d+)\.", name) for name in self._specs)
        beyond = any(number and int(number[1]) >= layers for number in numbers)
        return beyond or any("mtp." in name for name in self._specs)

    def _settings(self, folder: Path) -> dict[str, Any]:
        """The config as upstream reads it, and what is in the file under names that transformers 5 has given up."""
        read: dict[str, Any] = self._base.ModelBase.load_hparams(folder, False)
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        rope = read.get("rope_parameters") or {}
        older = {"n_ctx": read.get("n_positions"), "rotary_pct": rope.get("partial_rotary_factor")}
        settings = {**{key: value for key, value in older.items() if value is not None}, **stored, **read}
        if self._request["architecture"] in MAMBA_HYBRIDS and settings.get("layer_types"):
            settings["layer_types"] = [OLDER_LAYER_TYPES.get(kind, kind) for kind in settings["layer_types"]]
        return settings

    def _index_tensors(self) -> Callable[..., dict[str, object]]:
        """In place of the method that opens the checkpoint's files."""

        def index_tensors(model: Any, remote_hf_model_id: str | None = None) -> dict[str, object]:
            items = (model.filter_tensors((older_name(name), partial(self._leaf, name))) for name in self._specs)
            return dict(item for item in items if item is not None)

        return index_tensors

    def _pre_tokenizer(self, by_hash: Callable[[object, object], str]) -> Callable[[object, object], str]:
        """``tokenizer.ggml.pre``: as the user names it, else upstream's hash, else by its rules, from the parent."""

        def name(model: object, tokenizer: object) -> str:
            if self._request["pre"]:
                return self._request["pre"]
            try:
                return str(by_hash(model, tokenizer))
            except NotImplementedError:
                if self._request["pre_by_rules"]:
                    return self._request["pre_by_rules"]
                raise

        return name

    def _leaf(self, name: str) -> Node:
        """A tensor of the parent's, not yet here."""
        import torch

        shape, dtype = self._specs[name]
        meta = self._lazy.meta_with_dtype_and_shape(getattr(torch, dtype), shape)
        leaf = self._lazy(meta=meta, args=(name,), func=self._load)
        leaf.source = name
        return leaf

    def _load(self, name: str) -> Tensor:
        if name not in self._sources:
            return from_bytes(self._parent.ask(name), *self._specs[name])
        return self._sources[name]

    def _record(self, values: Node, kind: object) -> Recorded:
        import numpy

        return Recorded(values, tuple(values.shape), numpy.dtype(numpy.float32))

    def _describe(self, name: str, info: Any) -> PlannedTensor:
        """Shape, upstream's type, and where the values come from: rows as they are, a computation, or a constant."""
        import numpy

        planned: PlannedTensor = {"name": name, "shape": [int(n) for n in info.shape], "type": info.dtype.name}
        recorded = info.tensor
        if not isinstance(recorded, Recorded):  # converted by the class itself: its bytes are the file's
            planned["stored"] = numpy.ascontiguousarray(self._gguf.LazyNumpyTensor.to_eager(recorded)).data
        elif isinstance(recorded.values, numpy.ndarray):
            values = numpy.ascontiguousarray(recorded.values, numpy.float32)
            planned["constant"] = {"shape": list(values.shape), "values": values.data}
        else:
            self._lazy_targets[name] = recorded.values
            planned["straight"] = list(self._straight(recorded.values))
            planned["sources"] = [] if planned["straight"] else sorted(self._source_names(recorded.values))
        return planned

    def _straight(self, values: Node) -> Iterator[tuple[str, int]]:
        """(source, first row) where the rows of sources are stored one after another as they are; else nothing."""
        import torch

        inner: Node = values._args[0] if type(values) is self._gguf.LazyNumpyTensor and len(values._args) == 1 else None
        unchanged = type(inner) is self._lazy and inner.dtype in (torch.float32, torch.float16)
        if not unchanged or not values._func.__qualname__.startswith("LazyTorchTensor.numpy."):
            return
        if source_of(inner):
            yield source_of(inner), 0
            return
        if inner._func not in (torch.stack, torch.cat) or not inner._args:
            return  # before a look at the rest: to compare a lazy tensor is to read it
        parts, axis = inner._args[0], [*inner._args[1:], *inner._kwargs.values()]
        if axis in ([], [0]) and all(source_of(part) for part in parts) and self._rows_alike(parts):
            first = 0
            for part in parts:
                yield source_of(part), first
                first += int(part.numel() // part.shape[-1])

    @staticmethod
    def _rows_alike(parts: Sequence[Node]) -> bool:
        return len({part.shape[-1] for part in parts if len(part.shape) > 1}) == 1 and all(
            len(part.shape) > 1 for part in parts
        )

    def _source_names(self, root: Node) -> set[str]:
        """Every tensor of the parent's that a value is made from, as far as the graph shows it."""
        return {source_of(node) for node, _ in self._uses(root).values() if source_of(node)}

    def _uses(self, root: Node) -> dict[int, tuple[Node, int]]:
        """The lazy values in a graph, and how often each is used in it."""
        uses: dict[int, tuple[Node, int]] = {}
        waiting = [root]
        while waiting:
            node = waiting.pop()
            if isinstance(node, list | tuple):
                waiting += node
            elif isinstance(node, self._gguf.LazyBase):
                times = uses.get(id(node), (node, 0))[1]
                uses[id(node)] = (node, times + 1)
                waiting += [] if times else [node._args, list(node._kwargs.values())]
        return uses

    def _evaluate(self, node: Node, uses: Mapping[int, tuple[Node, int]], done: dict[int, Node]) -> Node:
        """What upstream's ``to_eager`` gives, but nothing is kept: memory is freed, a value may be asked for again."""
        if isinstance(node, list | tuple):
            return type(node)([self._evaluate(part, uses, done) for part in node])
        if isinstance(node, self._gguf.LazyChunkedTensor):
            import numpy

            return numpy.concatenate([chunk() for chunk in node._chunks]).reshape(node.shape)
        if not isinstance(node, self._gguf.LazyBase):
            return node
        if node._data is not None:
            return node._data
        if id(node) in done:
            return done[id(node)]
        value = node._func(*self._evaluate(node._args, uses, done), **node._kwargs)
        if uses[id(node)][1] > 1:
            done[id(node)] = value
        return value


def older_name(name: str) -> str:
    """A vision tower saved by transformers 5 under the name that upstream knows, with one level more."""
    return re.sub(r"^vision_tower\.(?=(embeddings|encoder|head|pre_layrnorm|post_layernorm)\.)", VISION, name)


def plain(value: Any) -> Any:
    """A metadata value without upstream's own classes and numpy's, which the parent cannot read."""
    if isinstance(value, str | bytes | bytearray | bool):
        return value
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return int(value) if isinstance(value, int) else value


def source_of(node: object) -> str:
    """The parent's name of a tensor that nothing was done to; empty for any other."""
    return str(vars(node).get("source", "")) if hasattr(node, "__dict__") else ""


def from_bytes(values: bytearray, shape: tuple[int, ...], dtype: str) -> Tensor:
    """The tensor of these bytes, which are not copied."""
    import torch

    kind = getattr(torch, dtype)
    return (torch.frombuffer(values, dtype=kind) if values else torch.empty(0, dtype=kind)).reshape(shape)


@contextmanager
def _refusals() -> Iterator[None]:
    """What upstream raises, with the place in its code: many of its assertions say nothing else."""
    try:
        yield
    except Exception as error:
        frame = extract_tb(error.__traceback__)[-1]
        line = f"{Path(frame.filename).name}, line {frame.lineno}: {frame.line}"
        raise UpstreamRefuses(f"{type(error).__name__}: {error} ({line})") from error
