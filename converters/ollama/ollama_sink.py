"""Ollama: the GGUF, a Modelfile whose TEMPLATE is proven, and the side files that ``ollama run hf.co/...`` reads."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import ClassVar

from converters.gguf import gguf_settings, tokenizer_check
from converters.gguf.gguf_sink import GgufOptions, GgufSink
from converters.gguf.llama.llama_process import Llama
from converters.gguf.nested_dir import NestedDir
from converters.ollama.chat import BOS_UNKNOWN, Chat, modelfile_files, read_chat, write_files
from lora2serve.artifacts.staging import StagedDir
from lora2serve.config.model_name import ollama_name
from lora2serve.errors import ExportError
from lora2serve.exporting.settings_plan import PlannedSettings
from lora2serve.exporting.sinks import ExportFacts, ExportModel
from lora2serve.system.extras import install_hint
from lora2serve.weights.tensors import Block, TensorSpec

# Ollama takes a chat template for a known one that is fewer than 100 edits away (``Named``, template/template.go).
# An edit adds or removes one tilde at most, so a template with fewer than 100 of them is never that near to this one.
LOOKALIKE_GUARD = (
    "{# This comment keeps Ollama from taking this template for another one that looks much like it.\n"
    + "~" * 200
    + " #}\n"  # the newline goes with it: trim_blocks
)


SHARDS = "gguf"  # the folder of a split GGUF: with other files in it, Ollama would not take it for one


@dataclass(frozen=True)
class OllamaOptions(GgufOptions):
    """Those of the GGUF."""


class OllamaSink:
    """``ollama create NAME -f Modelfile`` in the export's directory makes the model."""

    Options: ClassVar[type[OllamaOptions]] = OllamaOptions
    quants: ClassVar[tuple[str, ...]] = GgufSink.quants
    default_quant: ClassVar[str | None] = GgufSink.default_quant

    def __init__(self, model: ExportModel, out: StagedDir, options: OllamaOptions) -> None:
        self._out, self._name = out, ollama_name(model.name, "ollama")
        self._chat = read_chat(model)
        folder = NestedDir(out, SHARDS) if options.split_size else out
        self._gguf = GgufSink(model, folder, _guarded(options, self._chat))
        if not self._gguf.tokens.compared:
            raise ExportError(
                "--target ollama needs llama.cpp's library, to see whether BOS is added",
                install_hint("gguf"),
            )
        self.wanted = self._gguf.wanted
        self._file = _inside(self._gguf.files[0], options)
        self._modelfile = self._chat.modelfile(_from(self._file), self._gguf.tokens.adds_bos)
        self._text = self._modelfile.write()  # a value that Ollama would read otherwise is found before the first byte

    def write(self, spec: TensorSpec, rows: slice, block: Block) -> None:
        self._gguf.write(spec, rows, block)

    def finish(self) -> ExportFacts:
        facts = self._gguf.finish()
        write_files(self._out, self._modelfile, self._text)
        path = shlex.quote(str(self._out.target / "Modelfile"))
        record = self._chat.template_record(facts.architecture)
        return replace(facts, file=self._file, template=record, use=f"ollama create {self._name} -f {path}")

    def close(self) -> None:
        self._gguf.close()


def plan_settings(model: ExportModel, options: OllamaOptions) -> PlannedSettings:
    """Those of the GGUF, the Modelfile and what lies beside it."""
    chat = read_chat(model)
    with Llama() as llama:
        inside, plan = gguf_settings.plan_files(model, _guarded(options, chat), llama)
        tokens = tokenizer_check.without_proof(model, plan, llama)
    inside = inside.inside(SHARDS) if options.split_size else inside
    file = str(inside.facts.file)
    modelfile = chat.modelfile(_from(file), tokens is not None and tokens.adds_bos)
    return replace(
        inside,
        files=modelfile_files(modelfile, modelfile.write()),
        facts=replace(inside.facts, template=chat.template_record(inside.facts.architecture)),
        unplanned={**inside.unplanned, **(BOS_UNKNOWN if tokens is None else {})},
    )


def _inside(name: str, options: OllamaOptions) -> str:
    """Where a file of the GGUF lies in the export."""
    return f"{SHARDS}/{name}" if options.split_size else name


def _from(file: str) -> str:
    """What the Modelfile says: Ollama refuses one shard alone, and puts those of a folder together."""
    return f"./{SHARDS}" if file.startswith(f"{SHARDS}/") else f"./{file}"


def _guarded(options: OllamaOptions, chat: Chat) -> OllamaOptions:
    if not chat.jinja or chat.derived:
        return options
    return replace(options, chat_template=LOOKALIKE_GUARD + chat.jinja)
