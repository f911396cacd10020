"""The token with which a chat template closes an answer: what training taught the model to end with.

A base model's generation config often stops at another one (Qwen2.5 base: ``<|endoftext|>``, and its template closes
turns with ``<|im_end|>``). An engine that is not told of it goes on until the length is used up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lora2serve.system.small_files import JsonObject
from lora2serve.weights.chat_template import TOKENIZER, chat_templates, read_settings, special_tokens

if TYPE_CHECKING:
    from jinja2 import Environment

ANSWER, THOUGHT = "Zebra 8417", "Okapi 2963"  # what no template writes by itself
Messages = Sequence[Mapping[str, object]]


def find_answer_end(render: Callable[[Messages], str], tokens: Iterable[str]) -> str | None:
    """The first of ``tokens`` behind the answer; None where the template closes an answer with none of them.

    ``render`` gives a conversation as text. What follows the last answer counts; only where nothing does, what follows
    an earlier one: gpt-oss ends the last with another token. A token that closes thoughts as well ends no answer.
    """
    longest_first = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
    for content in (str, _part):
        question, answer = _message("user", "?", content), _message("assistant", ANSWER, content)
        for messages in ([question, answer], [question, answer, question]):
            try:
                _, found, rest = render(messages).rpartition(ANSWER)
            except Exception:  # a template raises what it likes to refuse a conversation
                break
            rest = rest.lstrip()
            if found and rest:
                end = next((token for token in longest_first if rest.startswith(token)), None)
                return None if end and end in _after_thoughts(render, question, answer) else end
    return None


def read_answer_end(files: Mapping[str, Path]) -> tuple[str, int] | None:
    """Text and id of the token that closes an answer, from a tokenizer's files; None where there is no such token."""
    templates, ids = chat_templates(files), _token_ids(files)
    template = templates.get("default") or templates.get("tool_use")
    if template is None or not ids:
        return None
    special = special_tokens(files)
    try:
        compiled = _environment().from_string(template)
    except Exception:  # a template of another dialect; what renders it will say so
        return None

    def render(messages: Messages) -> str:
        return compiled.render(messages=messages, add_generation_prompt=False, tools=None, documents=None, **special)

    end = find_answer_end(render, ids)
    return (end, ids[end]) if end else None


def _after_thoughts(render: Callable[[Messages], str], question: Mapping[str, object], answer: JsonObject) -> str:
    """What stands between the thoughts and the answer; empty where the template knows none."""
    thoughtful = {**answer, **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), THOUGHT)}
    try:
        _, found, rest = render([question, thoughtful]).partition(THOUGHT)
    except Exception:  # as above
        return ""
    return rest.rpartition(ANSWER)[0] if found else ""


def _message(role: str, text: str, content: Callable[[str], object]) -> dict[str, object]:
    return {"role": role, "content": content(text)}


def _part(text: str) -> list[dict[str, str]]:
    """Content as models with other senses than text want it."""
    return [{"type": "text", "text": text}]


def _token_ids(files: Mapping[str, Path]) -> dict[str, int]:
    """The added tokens, special ones and others, by their text."""
    if "tokenizer.json" in files:
        added = json.loads(files["tokenizer.json"].read_text(encoding="utf-8")).get("added_tokens") or []
        return {token["content"]: int(token["id"]) for token in added}
    decoder = read_settings(files, TOKENIZER).get("added_tokens_decoder") or {}
    return {token["content"]: int(number) for number, token in decoder.items()}


def _environment() -> Environment:
    """Jinja as transformers sets it up (``utils/chat_template_utils.py``), without the seconds of importing that."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationMarks(Extension):
        """{% generation %} marks what the assistant says, and prints it."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMarks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> NoReturn:
    raise ValueError(message)
