"""The settings in a GGUF file, as they are planned and as they are read: keys, and the types and shapes of tensors.

Read without gguf's own reader, which takes seconds for a vocabulary of 128k tokens; ``gguf_scan`` has looked before.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from converters.gguf import backends, presets, tokenizer_check
from converters.gguf.gguf_layout import Backend
from converters.gguf.gguf_plan import GgufPlan
from converters.gguf.gguf_scan import ARRAY, STRING, Cursor, scan_tensors
from converters.gguf.gguf_sink import GgufOptions
from converters.gguf.header import GgufTensor, Keys, TypedValue
from converters.gguf.llama.llama_process import Llama
from converters.gguf.shards import file_names, projector_stem, stem
from lora2serve.artifacts.manifest import NAME as MANIFEST
from lora2serve.errors import ExportError
from lora2serve.exporting.settings_plan import Header, HeaderValue, PlannedSettings
from lora2serve.exporting.sinks import ExportFacts, ExportModel

KINDS = {0: "u8", 1: "i8", 2: "u16", 3: "i16", 4: "u32", 5: "i32", 6: "f32", 7: "bool", 8: "text", 9: "list",
         10: "u64", 11: "i64", 12: "f64"}  # fmt: skip
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TENSORS = "tensors."  # before a tensor's name, among the keys
IMATRIX_KEYS = "quantize.imatrix.*"


def plan_settings(model: ExportModel, options: GgufOptions) -> PlannedSettings:
    """Those of the model's files, and of its projector's."""
    with Llama(at_once=False) as llama:  # of float types there is nothing to ask
        return plan_files(model, options, llama)[0]


def plan_files(model: ExportModel, options: GgufOptions, llama: Llama) -> tuple[PlannedSettings, GgufPlan]:
    """The same, and the plan of the model's file."""
    headers: dict[str, Header] = {}
    unplanned = {f"*.gguf:{IMATRIX_KEYS}": "the importance matrix is no part of the export"}
    plans: list[GgufPlan] = []
    names: list[list[str]] = []
    with ExitStack() as stack:
        opened = backends.open_backends(model, options)
        for backend in opened:
            stack.callback(backend.close)
        for backend in opened:
            main = not plans
            plan, why = _plan(backend, llama, options.tensor_type if main else ())
            if main:
                plan, unsure = _ending(model, plan, llama)
                unplanned |= unsure
            plans.append(plan)
            shards = plan.split(options.split_size if main else None)
            base = stem(model.name, options.quant) if main else projector_stem(model.name, backend.preset)
            names.append(file_names(base, len(shards)))
            for name, shard in zip(names[-1], shards, strict=True):
                headers[name] = settings(shard.keys, () if why else shard.tensors)
                unplanned |= {f"{name}:{TENSORS}*": why} if why else {}
            unplanned |= _uncounted(base, why) if why and main and options.split_size else {}
    facts = ExportFacts(
        architecture=opened[0].architecture, file=names[0][0], projector=names[1][0] if names[1:] else None,
        match_reference=options.match_reference,
    )  # fmt: skip
    return PlannedSettings({}, headers, tuple(headers), facts, unplanned), plans[0]


def _uncounted(base: str, why: str) -> dict[str, str]:
    """Of a split file whose tensors have unknown sizes: how many files it is."""
    names = (f"{base}.gguf", f"{base}-[0-9]*-of-[0-9]*.gguf")
    patterns = (*names, *(f"{name}:*" for name in names), f"{MANIFEST}:file")
    return dict.fromkeys(patterns, f"{why}, and so how many files there are")


def _plan(backend: Backend, llama: Llama, overrides: Sequence[str]) -> tuple[GgufPlan, str]:
    """The file, and why its tensors' types cannot be told here, if they cannot."""
    keys = backend.keys()
    types: Mapping[str, str] = {}
    why = f"which type a tensor of {backend.preset} has depends on the importance matrix"
    if backend.preset not in presets.PRESETS_THAT_NEED_IMATRIX:
        try:
            types, why = presets.choose(backend.preset, backend.tensors, keys, llama), ""
            types = presets.override(types, overrides)
        except ExportError as error:
            if llama.installed:
                raise
            why = error.message
    tensors = tuple(GgufTensor(t.name, t.shape, types.get(t.name, "F32")) for t in backend.tensors)
    return GgufPlan(keys, tensors), why


def _ending(model: ExportModel, plan: GgufPlan, llama: Llama) -> tuple[GgufPlan, Mapping[str, str]]:
    """The file with the token that closes an answer, where llama.cpp does not know of it by itself."""
    ended = tokenizer_check.ending(model, plan)
    if ended is plan:
        return plan, {}
    known = tokenizer_check.without_proof(model, plan, llama)
    if known is None:
        return ended, {"*.gguf:tokenizer.ggml.eo[tm]_token_id": "whether it is needed, llama.cpp's library knows"}
    return (plan if known.stops else ended), {}


def settings(keys: Keys, tensors: Sequence[GgufTensor]) -> Header:
    """Of a planned file."""
    values: dict[str, HeaderValue] = {key: _planned(value) for key, value in keys.items()}
    return values | {TENSORS + t.name: HeaderValue("tensor", f"{t.type} {list(t.shape)}") for t in tensors}


def read(path: Path) -> Header:
    """Of a file; CheckpointError where it is damaged."""
    tensors = scan_tensors(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = Cursor(path, data, 16)  # behind the count of tensors
        pairs = cursor.number("Q", "key count")
        values: dict[str, HeaderValue] = {}
        for _ in range(pairs):
            key = _text(cursor)
            values[str(key)] = _value(cursor, cursor.number("I", "type"))
        return values | {TENSORS + tensor.name: HeaderValue("tensor", tensor.kind) for tensor in tensors}


def _planned(entry: TypedValue) -> HeaderValue:
    """As ``read`` gives it: numbers rounded to their type, text as text wherever it is UTF-8."""
    value = entry.value
    if entry.type == ARRAY:
        assert isinstance(value, Sequence)
        inner = _element_type(value) if entry.element_type is None else entry.element_type
        return HeaderValue(f"list of {KINDS[inner]}", tuple(_stored(inner, item) for item in value))
    return HeaderValue(KINDS[entry.type], _stored(entry.type, value))


def _element_type(value: Sequence[object]) -> int:
    """What gguf's writer takes for the elements: the type of the first."""
    from gguf import GGUFValueType

    return int(GGUFValueType.get_type(value[0])) if len(value) else STRING


def _stored(kind: int, value: object) -> object:
    if kind == STRING:
        return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
    return struct.unpack(f"<{CODES[kind]}", struct.pack(f"<{CODES[kind]}", value))[0]


def _text(cursor: Cursor) -> str:
    return cursor.take(cursor.number("Q", "length"), "text").decode("utf-8", "surrogateescape")


def _value(cursor: Cursor, kind: int) -> HeaderValue:
    if kind == STRING:
        return HeaderValue(KINDS[kind], _text(cursor))
    if kind != ARRAY:
        code = f"<{CODES[kind]}"
        return HeaderValue(KINDS[kind], struct.unpack(code, cursor.take(struct.calcsize(code), "value"))[0])
    inner, length = cursor.number("I", "element type"), cursor.number("Q", "length")
    if inner == STRING:
        return HeaderValue(f"list of {KINDS[inner]}", tuple(_text(cursor) for _ in range(length)))
    code = f"<{length}{CODES[inner]}"
    return HeaderValue(f"list of {KINDS[inner]}", struct.unpack(code, cursor.take(struct.calcsize(code), "list")))
