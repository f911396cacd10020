"""The token with which a chat template closes an answer: what training taught the model to end with.

A base model's generation config often stops at another one (Qwen2.5 base: ``<|endoftext|>``, and its template closes
turns with ``<|im_end|>``). An engine that is not told of it goes on until the length is used up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lora2serve.data.end_tokens import Messages, find_answer_end
from lora2serve.weights.chat_template import TOKENIZER, chat_templates, read_settings, special_tokens

if TYPE_CHECKING:
    from jinja2 import Environment


def read_answer_end(files: Mapping[str, Path]) -> tuple[str, int] | None:
    """Text and id of the token that closes an answer, from a tokenizer's files; None where there is no such token."""
    templates = chat_templates(files)
    template = templates.get("default") or templates.get("tool_use")
    ids = _token_ids(files) if template is not None else {}
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


def _to_json(
    value: object, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    """With the arguments of transformers' own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise ValueError(message)
