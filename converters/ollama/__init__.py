"""Ollama: the GGUF, a Modelfile whose TEMPLATE is proven, and the side files that ``ollama run hf.co/...`` reads."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from converters.gguf import GgufOptions, GgufSink
from converters.gguf.vocab import tokenizer_directory
from converters.ollama import template as templates
from converters.ollama.modelfile import NUMBERS, Modelfile
from converters.ollama.template import Derived, Unproven
from lora2serve.errors import ExportError
from lora2serve.exporter import Model
from lora2serve.output import Output
from lora2serve.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

RAW = "{{ .Prompt }}"  # a model without a chat template completes text
NATIVE = "0.30.0"  # from here on Ollama renders the GGUF's own Jinja
# Ollama takes a chat template for the known one that is fewer than 100 edits away; a comment is more edits.
APART = (
    "{# This comment keeps Ollama from taking this template for another one that looks much like it: "
    "see detectChatTemplate in its server/model.go. #}\n"  # the newline goes with it: trim_blocks
)


@dataclass(frozen=True)
class OllamaOptions(GgufOptions):
    """Those of the GGUF."""


@dataclass(frozen=True)
class Chat:
    """How the model is talked to: its Jinja, the proven Go template or why there is none, and where answers end."""

    jinja: str | None
    special: Mapping[str, str]
    derived: Derived | None
    reason: str
    stop: tuple[str, ...]
    parameters: Mapping[str, float]


class OllamaSink:
    """``ollama create NAME -f Modelfile`` in the export's directory makes the model."""

    Options: ClassVar[type[OllamaOptions]] = OllamaOptions
    quants: ClassVar[tuple[str, ...]] = GgufSink.quants
    default_quant: ClassVar[str | None] = GgufSink.default_quant

    def __init__(self, model: Model, out: Output, options: OllamaOptions) -> None:
        if options.split_size is not None:
            raise ExportError("--split-size: Ollama loads no split files", "leave it out for --target ollama")
        self._out, self._name = out, model.name.lower()
        self._chat = read_chat(model)
        if self._chat.jinja and not self._chat.derived:
            options = replace(options, chat_template=APART + self._chat.jinja)
        self._gguf = GgufSink(model, out, options)
        self.wanted = self._gguf.wanted
        self._modelfile = self._write_modelfile()
        self._text = self._modelfile.write()  # a value that Ollama would read otherwise is found before the first byte

    def write(self, spec: TensorSpec, rows: slice, block: Tensor) -> None:
        self._gguf.write(spec, rows, block)

    def finish(self) -> Mapping[str, Any]:
        said = self._gguf.finish()
        self._out.text("Modelfile", self._text)
        if self._modelfile.template is not None:
            self._out.text("template", self._modelfile.template)
        params = {
            **self._modelfile.parameters,
            **({"stop": list(self._modelfile.stop)} if self._modelfile.stop else {}),
        }
        self._out.text("params", json.dumps(params, indent=2, ensure_ascii=False) + "\n")
        path = shlex.quote(str(self._out.target / "Modelfile"))
        return {**said, "template": self._about(), "use": f"ollama create {self._name} -f {path}"}

    def close(self) -> None:
        self._gguf.close()

    def _write_modelfile(self) -> Modelfile:
        chat = self._chat
        bos = chat.special.get("bos_token", "") if self._gguf.proof.adds_bos else ""
        template = chat.derived.go(bos) if chat.derived else (None if chat.jinja else RAW)
        return Modelfile(
            model=f"./{self._gguf.files[0]}",
            template=template,
            parameters=dict(chat.parameters),
            stop=chat.stop,
            requires=NATIVE if template is None else None,
        )

    def _about(self) -> dict[str, Any]:
        """For the manifest: how the template was made."""
        chat = self._chat
        if not chat.jinja:
            return {"kind": "none"}
        if not chat.derived:
            return {"kind": "jinja", "why": chat.reason, "requires": NATIVE}
        return {"kind": "go", "trims": chat.derived.trims, "native_preferred": templates.wants_native(chat.jinja)}


def read_chat(model: Model) -> Chat:
    """Everything about prompts from the tokenizer and the generation config."""
    from transformers import AutoTokenizer

    with tokenizer_directory(model) as folder:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    path = model.files.get("generation_config.json")
    generation = json.loads(path.read_text(encoding="utf-8")) if path else {}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    jinja = tokenizer.get_chat_template() if tokenizer.chat_template else None
    derived, reason = _derive(jinja, special)
    sampled = generation.get("do_sample", False)
    numbers = {
        theirs: generation[ours] for ours, theirs in NUMBERS.items() if sampled and generation.get(ours) is not None
    }
    return Chat(jinja, special, derived, reason, _stops(tokenizer, generation, derived), numbers)


def _derive(jinja: str | None, special: Mapping[str, str]) -> tuple[Derived | None, str]:
    if not jinja:
        return None, ""
    try:
        return templates.derive(templates.jinja(jinja, special)), ""
    except Unproven as reason:
        return None, str(reason)


def _stops(tokenizer: Any, generation: Mapping[str, Any], derived: Derived | None) -> tuple[str, ...]:
    """The end tokens of the generation config and the tokenizer, and the special token that closes a turn."""
    said = generation.get("eos_token_id")
    ids: Sequence[int] = said if isinstance(said, list) else [said] if said is not None else []
    stops = [tokenizer.eos_token, *(tokenizer.convert_ids_to_tokens(number) for number in ids)]
    if derived:
        closing = derived.pieces.to_user.lstrip()
        added = sorted(map(str, tokenizer.get_added_vocab()), key=len, reverse=True)
        stops += [token for token in added if token.strip() and closing.startswith(token)][:1]
    return tuple(dict.fromkeys(text for text in stops if text))
