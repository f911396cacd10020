"""The token with which a chat template closes an answer: what training taught the model to end with.

A base model's generation config often stops at another one (Qwen2.5 base: ``<|endoftext|>``, and its template closes
turns with ``<|im_end|>``). An engine that is not told of it goes on until the length is used up.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora2serve.data.end_tokens import Messages, find_answer_end
from lora2serve.errors import CheckpointError
from lora2serve.exporting.jinja_sandbox import compiled_template
from lora2serve.system.small_files import read_json
from lora2serve.weights.chat_template import TOKENIZER, chat_templates, read_settings, special_tokens


def read_answer_end(files: Mapping[str, Path]) -> tuple[str, int] | None:
    """Text and id of the token that closes an answer, from a tokenizer's files; None where there is no such token."""
    templates = chat_templates(files)
    template = templates.get("default") or templates.get("tool_use")
    ids = _token_ids(files) if template is not None else {}
    if template is None or not ids:
        return None
    special = special_tokens(files)
    try:
        compiled = compiled_template(template)
    except Exception:  # a template of another dialect; what renders it will say so
        return None

    def render(messages: Messages) -> str:
        return compiled.render(messages=messages, add_generation_prompt=False, tools=None, documents=None, **special)

    end = find_answer_end(render, ids)
    return (end, ids[end]) if end else None


def _token_ids(files: Mapping[str, Path]) -> dict[str, int]:
    """The added tokens, special ones and others, by their text."""
    file = files.get("tokenizer.json")
    try:
        if file:
            added = read_json(file, "no tokenizer.json").get("added_tokens") or []
            return {str(token["content"]): int(token["id"]) for token in added}
        decoder = read_settings(files, TOKENIZER).get("added_tokens_decoder") or {}
        return {str(token["content"]): int(number) for number, token in decoder.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{file or files[TOKENIZER]}: its added tokens are not texts with ids") from None
