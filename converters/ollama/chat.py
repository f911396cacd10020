"""How a model is talked to: its Jinja, the proven Go template or why there is none, and where answers end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from converters.gguf.jinja_template import Jinja, TrainedJinja
from converters.gguf.template_copy import as_trained
from converters.ollama import go_template
from converters.ollama.chat_tokenizer import ChatTokenizer, read_tokenizer
from converters.ollama.go_template import DerivedTemplate
from converters.ollama.modelfile import PARAMETER_NAMES, Modelfile, ParameterValue
from converters.ollama.modelfile_parser import PARAMETERS
from converters.ollama.template_not_proven import TemplateNotProven
from lora2serve.artifacts.manifest import TemplateRecord
from lora2serve.artifacts.staging import StagedDir, as_json
from lora2serve.errors import ExportError
from lora2serve.exporting.sinks import ExportModel

PENALTY = "repetition_penalty"
COMPLETION_TEMPLATE = "{{ .Prompt }}"  # a model without a chat template completes text
RENDERS_JINJA_FROM = "0.30.0"  # from here on Ollama renders the GGUF's own Jinja
# Architectures that Ollama renders and parses by code of its own, whatever TEMPLATE and Jinja say (server/create.go).
OLLAMA_RENDERS = ("gemma4", "gpt-oss", "laguna", "nemotron_h", "nemotron_h_moe")
BOS_UNKNOWN = dict.fromkeys(
    ("Modelfile:template", "template:*"),
    "whether it begins with BOS follows from llama.cpp's library, which is not here",
)
KNOWS_DATES_FROM = "0.14.0"  # knows REQUIRES; ``currentDate`` is older


@dataclass(frozen=True)
class Chat:
    """Everything about prompts; ``system`` is the template's own default, where it stands alone."""

    jinja: str | None
    special: Mapping[str, str]
    derived: DerivedTemplate | None
    reason: str
    system: str | None
    stop: tuple[str, ...]
    parameters: Mapping[str, ParameterValue]
    adds_bos: bool = False  # whether the tokenizer puts BOS before plain text

    def modelfile(self, model: str, adds_bos: bool, adapter: str | None = None) -> Modelfile:
        """``adds_bos``: llama.cpp puts BOS before every prompt by itself, so the template must not."""
        bos = self.special.get("bos_token", "") if adds_bos else ""
        template = self.derived.go(bos) if self.derived else (None if self.jinja else COMPLETION_TEMPLATE)
        dated = self.derived is not None and self.derived.dated
        requires = RENDERS_JINJA_FROM if template is None else KNOWS_DATES_FROM if dated else None
        return Modelfile(model, template, self.system, self.parameters, self.stop, adapter, requires)

    def template_record(self, architecture: str | None, *, on_base: bool = False) -> TemplateRecord:
        """For the manifest: how the template was made, and what it cannot do; ``on_base``: of an adapter alone."""
        if not self.jinja:
            return TemplateRecord("none")
        limits: dict[str, object] = {"ollama_renders": architecture in OLLAMA_RENDERS}
        if on_base:
            limits["base_unlike_training"] = list(self._unlike_training())
        if not self.derived:
            return TemplateRecord("jinja", RENDERS_JINJA_FROM, unknown={"why": self.reason, **limits})
        limits |= {
            "trims": self.derived.trims,
            "drops_thoughts": self.derived.drops_thoughts,
            "dated": self.derived.dated,
            "native_preferred": go_template.prefers_jinja(self.jinja),
            "refuses": list(self.derived.refuses),
            "differ": list(self.derived.differ),
        }
        return TemplateRecord("go", unknown=limits)

    def _unlike_training(self) -> Iterator[str]:
        """What a base that is not exported here has otherwise than training had it: its Jinja's variables, its BOS."""
        jinja = Jinja(self.jinja or "", self.special)
        if go_template.prefers_jinja(jinja.template) and as_trained(jinja) != jinja.template:
            yield "variables"
        if self.adds_bos and self.derived and not self.derived.pieces.head.startswith(self.special["bos_token"]):
            yield "bos"


def read_chat(model: ExportModel) -> Chat:
    """Everything about prompts from the tokenizer and the generation config."""
    path = model.files.get("generation_config.json")
    generation = json.loads(path.read_text(encoding="utf-8")) if path else {}
    eos = generation.get("eos_token_id")
    ends: Sequence[int] = eos if isinstance(eos, list) else [eos] if isinstance(eos, int) else []
    tokenizer = read_tokenizer(model, ends)
    jinja, special = tokenizer.template, tokenizer.special
    derived, reason = _derive(jinja, tuple(sorted(special.items())))
    system = go_template.default_system(TrainedJinja(jinja, special), derived) if jinja and derived else None
    stop = _stops(tokenizer, ends, derived, model.answer_end)
    return Chat(jinja, special, derived, reason, system, stop, _parameters(generation, model), tokenizer.adds_bos)


def modelfile_files(modelfile: Modelfile, text: str) -> dict[str, bytes]:
    """The Modelfile, and ``template``, ``system`` and ``params``: what the Hub reads for ``ollama run hf.co/...``."""
    parts = {"Modelfile": text, "template": modelfile.template, "system": modelfile.system}
    files = {name: content.encode() for name, content in parts.items() if content is not None}
    return files | {"params": as_json(modelfile.params())}


def write_files(out: StagedDir, modelfile: Modelfile, text: str) -> None:
    """``modelfile_files``, into the output."""
    for name, content in modelfile_files(modelfile, text).items():
        out.bytes(name, content)


@lru_cache(maxsize=8)  # the exports of one command have the same one, and it is rendered a hundred times
def _derive(jinja: str | None, special: tuple[tuple[str, str], ...]) -> tuple[DerivedTemplate | None, str]:
    if not jinja:
        return None, ""
    try:
        return go_template.derive(TrainedJinja(jinja, dict(special))), ""
    except TemplateNotProven as reason:
        return None, str(reason)


def _parameters(generation: Mapping[str, object], model: ExportModel) -> dict[str, ParameterValue]:
    """Sampling defaults in the types that Ollama takes, where the model samples; a penalty in any case.

    In training it looked at the whole context, in Ollama at 64 tokens where none are named.
    """
    parameters: dict[str, ParameterValue] = {}
    for ours, theirs in PARAMETER_NAMES.items():
        value, kind = generation.get(ours), PARAMETERS[theirs]
        if value is None or kind is None or not (ours == PENALTY or generation.get("do_sample", False)):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or kind(value) != value:
            raise ExportError(
                f"generation_config.json: {ours} is {value!r}, expected {'a whole' if kind is int else 'a'} number",
                "correct it in the model's directory, or take it out",
            )
        parameters[theirs] = kind(value)
    context = (model.config.get("text_config") or model.config).get("max_position_embeddings")
    if parameters.get("repeat_penalty", 1) != 1 and context:
        parameters["repeat_last_n"] = int(context)
    return parameters


def _stops(
    tokenizer: ChatTokenizer, ends: Sequence[int], derived: DerivedTemplate | None, answer_end: tuple[str, int] | None
) -> tuple[str, ...]:
    """The end tokens of the tokenizer and the generation config (``ends``), and the token that closes a turn."""
    stops = [tokenizer.special.get("eos_token", ""), *(tokenizer.texts.get(number, "") for number in ends)]
    if derived:
        closing = derived.pieces.to_user.lstrip()
        longest_first = sorted(tokenizer.added, key=len, reverse=True)
        stops += [token for token in longest_first if token.strip() and closing.startswith(token)][:1]
    stops += answer_end[:1] if answer_end else ()
    return tuple(dict.fromkeys(text for text in stops if text))
