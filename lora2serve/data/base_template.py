"""The chat template of a base model as a recipe has it: its own, a file, or a format by name."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path

from lora2serve.data.chat_formats import set_chat_template
from lora2serve.data.end_tokens import stop_ids
from lora2serve.data.new_tokens import add_new_tokens
from lora2serve.data.served_template import ChatTemplate
from lora2serve.data.tokenizer import load_tokenizer


def base_template(
    base: Path, chat_template: str | None = None, day: str | None = None, new_tokens: Sequence[str] = ()
) -> ChatTemplate:
    """Of a base model's directory, which may be without weights; two settings are those of ``data``.

    ``day`` is what a template prints that prints the date (``YYYY-MM-DD``); None for today.
    """
    tokenizer = load_tokenizer(base)
    tokens = add_new_tokens(tokenizer, new_tokens)
    if chat_template is not None:
        set_chat_template(tokenizer, chat_template)
    return ChatTemplate(tokenizer, tuple(stop_ids(base)), date.fromisoformat(day) if day else None, tokens)
