"""The GGUF's copy of a chat template: on a server, it renders what it rendered in training.

llama-server, and Ollama with it, sets variables that training had not (``common_chat_extra_context`` in its
common/chat.cpp, ``caps_apply_preserve_reasoning`` in common/jinja/caps.cpp): today's date, thinking on, old thoughts
kept. Some that transformers sets it leaves out. Where one of them changes a prompt, the copy begins with its value in
training, which is mostly none: ``undefined`` is a name that nothing defines, in every engine for Jinja.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from converters.gguf.header import Keys, TypedValue, typed
from converters.gguf.jinja_template import Jinja, Messages, Tools
from lora2serve.data.rows import Message
from lora2serve.weights.chat_template import read_settings, special_tokens

DAY = date(2031, 11, 23)  # of the comparison: no template was written for it
KEY = "tokenizer.chat_template"  # of another name: KEY.NAME
ADD_BOS, MODEL = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.model"
SUPPRESS = "tokenizer.ggml.suppress_tokens"
PENALTY, PENALIZED = "general.sampling.penalty_repeat", "general.sampling.penalty_last_n"
SERVED_TOKENS = ("bos_token", "eos_token")
ALWAYS_THERE = ("tools", "documents")  # None in transformers, where there are none
COMMENT = "{#- A server sets these otherwise than they were in training. #}\n"
_QUESTION: Message = {"role": "user", "content": "Which word is it?"}
_THOUGHT: Message = {"role": "assistant", "content": "<think>\nOne?\n</think>\n\nOne.", "reasoning_content": "One?"}
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call12345", "type": "function", "function": {"name": "find", "arguments": {"word": "one"}}}],
}
_RESULT: Message = {"role": "tool", "name": "find", "tool_call_id": "call12345", "content": "1"}
_FIND: Mapping[str, object] = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds a word.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "The word."}},
            "required": ["word"],
        },
    },
}


@dataclass(frozen=True)
class Probe:
    """A conversation to compare on."""

    messages: Messages
    tools: Tools | None = None


def probes() -> Iterator[Probe]:
    """With and without a system message, thoughts, tools and their calls."""
    system: Message = {"role": "system", "content": "Be brief."}
    answer: Message = {"role": "assistant", "content": "One."}
    plain: list[Messages] = [
        [_QUESTION], [_QUESTION, answer, _QUESTION], [_QUESTION, _THOUGHT, _QUESTION, _THOUGHT, _QUESTION],
        [answer, _QUESTION],
    ]  # fmt: skip
    for messages in plain:
        yield from (Probe(messages), Probe([system, *messages]))
    for messages in ([_QUESTION], [_QUESTION, _CALL, _RESULT], [_QUESTION, _CALL, _RESULT, answer, _QUESTION]):
        yield from (Probe(messages, [_FIND]), Probe([system, *messages], [_FIND]))


def as_trained_keys(files: Mapping[str, Path], keys: Keys) -> dict[str, TypedValue]:
    """The keys of a GGUF, with its chat templates and BOS as in training; ``files`` are the model's.

    A repetition penalty looks at the whole context there, and in llama.cpp at 64 tokens where none are named.
    """
    variables = special_tokens(files)
    changed = dict(keys)
    for key, entry in keys.items():
        if key == KEY or key.startswith(f"{KEY}."):
            changed[key] = replace(entry, value=as_trained(Jinja(str(entry.value), variables)))
    if KEY in keys and adds_foreign_bos(Jinja(str(keys[KEY].value), variables), keys):
        changed |= typed({ADD_BOS: False})
    context = next((entry.value for key, entry in keys.items() if key.endswith(".context_length")), None)
    if (never := suppressed(files)) and SUPPRESS not in keys:
        changed |= typed({SUPPRESS: never})
    if PENALTY in keys and keys[PENALTY].value != 1 and isinstance(context, int):
        changed |= typed({PENALIZED: context})
    return changed


def suppressed(files: Mapping[str, Path]) -> list[int]:
    """The tokens that the generation config keeps out of every answer."""
    tokens = read_settings(files, "generation_config.json").get("suppress_tokens")
    return [token for token in tokens if isinstance(token, int)] if isinstance(tokens, list) else []


def adds_foreign_bos(jinja: Jinja, keys: Keys) -> bool:
    """Whether llama.cpp would put BOS before prompts that began without it in training: the template prints none.

    The tokenizer adds one to plain text, and to nothing that a chat template wrote.
    """
    bos = jinja.variables.get("bos_token")
    by_default = MODEL in keys and keys[MODEL].value == "llama"  # SentencePiece, in llama.cpp
    if not bos or not (keys[ADD_BOS].value if ADD_BOS in keys else by_default):
        return False
    if "bos_token" not in jinja.template and str(bos) not in jinja.template:
        return True
    rendered = (jinja.attempt(probe.messages, _clock, probe.tools) for probe in probes())
    return not next((text for text in rendered if text is not None), str(bos)).startswith(str(bos))


def as_trained(jinja: Jinja) -> str:
    """The template, which begins with the variables of training where a server's would change a prompt.

    ``jinja.variables`` are those of training.
    """
    comparison = _Comparison(jinja)
    needed = [name for name in comparison.names if comparison.differs([name])]
    lines = _lines(needed, jinja.variables)
    if comparison.differs(comparison.names, lines):  # two that only together change something
        lines = _lines(comparison.names, jinja.variables)
    return f"{COMMENT}{lines}{jinja.template}" if lines else jinja.template


class _Comparison:
    """What training rendered, beside what a server renders."""

    def __init__(self, jinja: Jinja) -> None:
        self._jinja = jinja
        self._served = _served_variables(jinja.variables, DAY)
        everything = {**jinja.variables, **self._served, **dict.fromkeys(ALWAYS_THERE)}
        self.names = [name for name in everything if self._is_other(name)]
        rendered = ((probe, jinja.attempt(probe.messages, _clock, probe.tools)) for probe in probes() if self.names)
        self._trained = [(probe, text) for probe, text in rendered if text is not None]

    def differs(self, names: Sequence[str], lines: str = "") -> bool:
        """Whether a prompt changes where these variables are a server's, and the template begins with ``lines``."""
        return any(
            self._as_served(names, lines, probe.tools).attempt(probe.messages, _clock, probe.tools) != text
            for probe, text in self._trained
        )

    def _is_other(self, name: str) -> bool:
        """Whether the template names a variable that the server has otherwise."""
        trained, served = self._jinja.variables, self._served
        return re.search(rf"\b{name}\b", self._jinja.template) is not None and (
            (name in trained) != (name in served) or trained.get(name) != served.get(name) or name in ALWAYS_THERE
        )

    def _as_served(self, names: Sequence[str], lines: str, tools: Tools | None) -> Jinja:
        variables = {name: value for name, value in self._jinja.variables.items() if name not in names}
        variables |= {name: self._served[name] for name in names if name in self._served}
        absent = [name for name in ALWAYS_THERE if name in names and not (tools and name == "tools")]
        return Jinja(_unset(absent) + lines + self._jinja.template, variables)


def _served_variables(trained: Mapping[str, object], day: date) -> dict[str, object]:
    """What llama-server renders with on that day, where no request asks for something else.

    ``bos_token`` and ``eos_token`` are the vocabulary's, which has them even where the tokenizer names none.
    """
    keeps_thoughts = {
        "preserve_reasoning": True, "preserve_thinking": True,
        "clear_thinking": False, "truncate_history_thinking": False, "drop_thinking": False,
    }  # fmt: skip
    return {
        **{name: trained.get(name, f"<{name}>") for name in SERVED_TOKENS},
        "enable_thinking": True,
        **keeps_thoughts,
        "date_string": day.strftime("%d %b %Y"),
        "datetime": day.strftime("%b %d %Y"),
    }


def _lines(names: Sequence[str], trained: Mapping[str, object]) -> str:
    """A line that sets each of them as in training; its newline goes with it (trim_blocks)."""
    values = {name: _literal(trained[name]) if name in trained else "undefined" for name in names}
    values |= {name: f"{name} | default(none)" for name in names if name in ALWAYS_THERE}
    return "".join(f"{{%- set {name} = {value} %}}\n" for name, value in values.items())


def _unset(names: Sequence[str]) -> str:
    return "".join(f"{{%- set {name} = undefined %}}\n" for name in names)


def _literal(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False)


def _clock(pattern: str) -> str:
    return DAY.strftime(pattern)
