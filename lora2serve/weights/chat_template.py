"""The chat templates and the special tokens among a tokenizer's files, where each generation of transformers puts them.

``chat_template.jinja`` (from 4.51), ``chat_template`` in tokenizer_config.json (before), ``chat_template.json`` (of a
processor); a template of another name in ``additional_chat_templates/NAME.jinja``, or in a list.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from lora2serve.system.small_files import JsonObject

JINJA, PROCESSOR, EXTRA = "chat_template.jinja", "chat_template.json", "additional_chat_templates/"
TOKENIZER, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
GENERATION = "generation_config.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

Files = Mapping[str, Path]


def chat_templates(files: Files) -> dict[str, str]:
    """Name -> template, as transformers reads them; the plain one is called "default"."""
    found = {name: path for name, path in files.items() if name == JINJA or name.startswith(EXTRA)}
    if found:
        named = {"default" if name == JINJA else Path(name).stem: path for name, path in found.items()}
        return {name: path.read_text(encoding="utf-8") for name, path in named.items()}
    value = read_settings(files, TOKENIZER).get("chat_template") or read_settings(files, PROCESSOR).get("chat_template")
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict)]
        return {str(entry.get("name")): str(entry.get("template")) for entry in entries}
    return {"default": value} if isinstance(value, str) else {}


def chat_template(files: Files) -> str | None:
    """The template that is used: the one for tools where there are several; None where there is none."""
    templates = chat_templates(files)
    return templates.get("tool_use") or templates.get("default")


def special_tokens(files: Files) -> dict[str, str]:
    """``bos_token``, ``eos_token`` and their like, as text; those that are set."""
    settings = {**read_settings(files, SPECIAL), **read_settings(files, TOKENIZER)}
    texts = {key: token_text(settings.get(key)) for key in SPECIAL_TOKENS}
    return {key: text for key, text in texts.items() if text}


def token_text(token: object) -> str | None:
    """A token as the settings write it: text, or an object with its text and how it splits."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def read_settings(files: Files, name: str) -> JsonObject:
    """A JSON file of settings; empty where there is none, or no object in it."""
    content = json.loads(files[name].read_text(encoding="utf-8")) if name in files else {}
    return cast("JsonObject", content) if isinstance(content, dict) else {}
