"""How a model is talked to: its Jinja, the proven Go template or why there is none, and where answers end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converters.gguf.native.vocab import tokenizer_directory
from converters.ollama import go_template as templates
from converters.ollama.go_template import Derived, Jinja
from converters.ollama.modelfile import NUMBERS, Modelfile, Value
from converters.ollama.modelfile_parser import PARAMETERS
from converters.ollama.template_not_proven import TemplateNotProven
from lora2serve.artifacts.staging import StagedDir
from lora2serve.errors import ExportError
from lora2serve.exporting.sinks import ExportModel

RAW = "{{ .Prompt }}"  # a model without a chat template completes text
NATIVE = "0.30.0"  # from here on Ollama renders the GGUF's own Jinja
DATED = "0.14.0"  # knows REQUIRES; ``currentDate`` is older


@dataclass(frozen=True)
class Chat:
    """Everything about prompts; ``system`` is the template's own default, where it stands alone."""

    jinja: str | None
    special: Mapping[str, str]
    derived: Derived | None
    reason: str
    system: str | None
    stop: tuple[str, ...]
    parameters: Mapping[str, Value]

    def modelfile(self, model: str, adds_bos: bool, adapter: str | None = None) -> Modelfile:
        """``adds_bos``: llama.cpp puts BOS before every prompt by itself, so the template must not."""
        bos = self.special.get("bos_token", "") if adds_bos else ""
        template = self.derived.go(bos) if self.derived else (None if self.jinja else RAW)
        requires = NATIVE if template is None else DATED if self.derived and self.derived.dated else None
        return Modelfile(model, template, self.system, self.parameters, self.stop, adapter, requires)

    def about(self) -> dict[str, Any]:
        """For the manifest: how the template was made, and what it cannot do."""
        if not self.jinja:
            return {"kind": "none"}
        if not self.derived:
            return {"kind": "jinja", "why": self.reason, "requires": NATIVE}
        made = self.derived
        return {
            "kind": "go",
            "trims": made.trims,
            "drops_thoughts": made.drops_thoughts,
            "dated": made.dated,
            "native_preferred": templates.wants_native(self.jinja),
        }


def read_chat(model: ExportModel) -> Chat:
    """Everything about prompts from the tokenizer and the generation config."""
    from transformers import AutoTokenizer

    with tokenizer_directory(model) as folder:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    path = model.files.get("generation_config.json")
    generation = json.loads(path.read_text(encoding="utf-8")) if path else {}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    jinja = tokenizer.get_chat_template() if tokenizer.chat_template else None
    derived, reason = _derive(jinja, special)
    system = templates.default_system(Jinja(jinja, special), derived) if jinja and derived else None
    stop = _stops(tokenizer, generation, derived)
    return Chat(jinja, special, derived, reason, system, stop, _parameters(generation))


def write_files(out: StagedDir, modelfile: Modelfile, text: str) -> None:
    """The Modelfile, and ``template``, ``system`` and ``params``: what the Hub reads for ``ollama run hf.co/...``."""
    out.text("Modelfile", text)
    for name, content in (("template", modelfile.template), ("system", modelfile.system)):
        if content is not None:
            out.text(name, content)
    out.text("params", json.dumps(modelfile.params(), indent=2, ensure_ascii=False) + "\n")


def _derive(jinja: str | None, special: Mapping[str, str]) -> tuple[Derived | None, str]:
    if not jinja:
        return None, ""
    try:
        return templates.derive(Jinja(jinja, special)), ""
    except TemplateNotProven as reason:
        return None, str(reason)


def _parameters(generation: Mapping[str, Any]) -> dict[str, Value]:
    """Sampling defaults in the types that Ollama takes, where the model samples."""
    found: dict[str, Value] = {}
    for ours, theirs in NUMBERS.items() if generation.get("do_sample", False) else ():
        value, kind = generation.get(ours), PARAMETERS[theirs]
        if value is None or kind is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or kind(value) != value:
            raise ExportError(
                f"generation_config.json: {ours} is {value!r}, expected {'a whole' if kind is int else 'a'} number",
                "correct it in the model's directory, or take it out",
            )
        found[theirs] = kind(value)
    return found


def _stops(tokenizer: Any, generation: Mapping[str, Any], derived: Derived | None) -> tuple[str, ...]:
    """The end tokens of the generation config and the tokenizer, and the special token that closes a turn."""
    said = generation.get("eos_token_id")
    ids: Sequence[int] = said if isinstance(said, list) else [said] if said is not None else []
    stops = [tokenizer.eos_token, *(_text(tokenizer, number) for number in ids)]
    if derived:
        closing = derived.pieces.to_user.lstrip()
        added = sorted(map(str, tokenizer.get_added_vocab()), key=len, reverse=True)
        stops += [token for token in added if token.strip() and closing.startswith(token)][:1]
    return tuple(dict.fromkeys(text for text in stops if text))


def _text(tokenizer: Any, number: int) -> str:
    """What the token prints: an ordinary one is stored in another alphabet (``Ċ`` is a newline)."""
    return str(tokenizer.decode([number], skip_special_tokens=False)) if 0 <= number < len(tokenizer) else ""
