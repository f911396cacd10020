"""A LoRA for a model that Ollama has: ``FROM BASE`` and ``ADAPTER`` with the GGUF adapter."""

from __future__ import annotations

import shlex
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from converters.gguf import gguf_adapter, gguf_settings, tokenizer_check
from converters.gguf.gguf_adapter import GgufAdapterOptions, GgufAdapterSink
from converters.gguf.gguf_sink import GgufOptions, GgufSink
from converters.gguf.llama.llama_process import Llama
from converters.ollama.chat import BOS_UNKNOWN, modelfile_files, read_chat, write_files
from converters.ollama.go_template import prefers_jinja
from lora2serve.artifacts.staging import DryRunDir, StagedDir
from lora2serve.config.model_name import ollama_name
from lora2serve.errors import ExportError
from lora2serve.exporting.settings_plan import PlannedSettings
from lora2serve.exporting.sinks import ExportFacts, ExportModel
from lora2serve.weights.chat_template import chat_template
from lora2serve.weights.side_files import side_files
from lora2serve.weights.tensors import Block, TensorSpec


@dataclass(frozen=True)
class OllamaAdapterOptions:
    """``from_model``: the base in Ollama, by its name there or as the path of a GGUF."""

    from_model: str | None = None


class OllamaAdapterSink:
    """Ollama lays the adapter on the base when it loads it; the scale is in the adapter."""

    Options: ClassVar[type[OllamaAdapterOptions]] = OllamaAdapterOptions
    quants: ClassVar[tuple[str, ...]] = ()
    default_quant: ClassVar[str | None] = None

    def __init__(self, model: ExportModel, out: StagedDir, options: OllamaAdapterOptions) -> None:
        base, chat = _base(options.from_model), read_chat(model)
        if chat.jinja and not chat.derived:
            raise ExportError(
                f"--as adapter: no proven template ({chat.reason}), and an adapter cannot carry its own Jinja",
                "use --target ollama without --as: the GGUF carries the Jinja",
            )
        _refuse_shadowed(model, chat.jinja)
        self._adapter = GgufAdapterSink(model, out, GgufAdapterOptions())
        self.wanted = self._adapter.wanted
        self._out, self._chat, self._from = out, chat, base
        self._name = ollama_name(model.name, "ollama-adapter")
        self._modelfile = chat.modelfile(base, _adds_bos(model, out), f"./{self._adapter.name}")
        self._text = self._modelfile.write()

    def write(self, spec: TensorSpec, rows: slice, block: Block) -> None:
        """Never called: nothing is wanted of the merged model."""

    def finish(self) -> ExportFacts:
        facts = self._adapter.finish()
        write_files(self._out, self._modelfile, self._text)
        use = f"ollama create {self._name} -f {shlex.quote(str(self._out.target / 'Modelfile'))}"
        record = self._chat.template_record(facts.architecture, on_base=True)
        return replace(facts, template=record, from_model=self._from, use=use)

    def close(self) -> None:
        self._adapter.close()


def plan_settings(model: ExportModel, options: OllamaAdapterOptions) -> PlannedSettings:
    """Those of the adapter, the Modelfile and what lies beside it. The base may be on another machine by now."""
    chat, base = read_chat(model), options.from_model or ""
    with Llama() as llama:
        _, plan = gguf_settings.plan_files(model, GgufOptions(quant="F16"), llama)
        tokens = tokenizer_check.without_proof(model, plan, llama)
    inside = gguf_adapter.plan_settings(model, GgufAdapterOptions())
    modelfile = chat.modelfile(base, tokens is not None and tokens.adds_bos, f"./{inside.facts.file}")
    return replace(
        inside,
        files=modelfile_files(modelfile, modelfile.write()),
        facts=replace(
            inside.facts, template=chat.template_record(inside.facts.architecture, on_base=True), from_model=base
        ),
        unplanned={**inside.unplanned, **(BOS_UNKNOWN if tokens is None else {})},
    )


def _base(name: str | None) -> str:
    """A name as it is, a file or a folder by its absolute path: Ollama takes a mistyped path for a name."""
    if not name:
        raise ExportError("--as adapter: expected --from BASE", "the base as Ollama knows it, such as llama3.2:1b")
    path = Path(name).expanduser()
    if path.is_file() or (path.is_dir() and list(path.glob("*.gguf"))):  # a folder: the shards of a split one
        return str(path.resolve())
    if name.endswith(".gguf") or name.startswith(("/", "./", "../", "~")) or path.exists():
        raise ExportError(
            f"--from {name}: no such GGUF file", "a file, a folder of them, or a name that `ollama list` shows"
        )
    return name


def _adds_bos(model: ExportModel, out: StagedDir) -> bool:
    """Whether llama.cpp adds BOS with this tokenizer: asked of it, on a header that is never written."""
    unwritten = DryRunDir(out.target)
    try:
        with closing(GgufSink(model, unwritten, GgufOptions(quant="F16"))) as sink:
            return sink.tokens.adds_bos
    finally:
        unwritten.discard()


def _refuse_shadowed(model: ExportModel, jinja: str | None) -> None:
    """From 0.30 on Ollama prefers the base's own Jinja to a TEMPLATE where that Jinja knows tools or thinking."""
    base = Path(model.lineage.base.path)
    template = chat_template(side_files(base))
    if template and template != jinja and prefers_jinja(template):
        raise ExportError(
            "--as adapter: the model was trained with a chat template other than the base's, which Ollama would prefer",
            "use --target ollama without --as: the GGUF carries the template used in training",
        )
