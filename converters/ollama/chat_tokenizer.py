"""What of a tokenizer prompts depend on: its template, special tokens, and whether it puts BOS before a text.

Read from its files where they say all of it, without the seconds that transformers takes to load; else transformers is
asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from converters.gguf.tokenizer_files import added_tokens, tokenizer_directory
from lora2serve.exporting.sinks import ExportModel
from lora2serve.weights.chat_template import (
    SPECIAL,
    SPECIAL_TOKENS,
    TOKENIZER,
    chat_templates,
    read_settings,
    special_tokens,
    token_text,
)

# Classes that take special tokens and BOS from the files, where those name them; others have tokens of their own.
AS_IN_FILES = ("TokenizersBackend", "PreTrainedTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer")
WITHOUT_BOS = ("Qwen2Tokenizer",)  # where the files name none
ADDS = ("add_bos_token", "add_eos_token")  # with a BOS to add, such a key has transformers make the post-processor


@dataclass(frozen=True)
class ChatTokenizer:
    """``special``: bos_token, eos_token and their like, as text; ``texts``: what the asked ids print."""

    template: str | None
    special: Mapping[str, str]
    added: tuple[str, ...]
    texts: Mapping[int, str]
    adds_bos: bool


def read_tokenizer(model: ExportModel, ids: Sequence[int]) -> ChatTokenizer:
    """The tokenizer of a model, and what ``ids`` print; empty where it has no such token."""
    return _of_files(model, ids) or _of_transformers(model, ids)


def _of_files(model: ExportModel, ids: Sequence[int]) -> ChatTokenizer | None:
    """None where transformers may add something of its own."""
    settings, templates = read_settings(model.files, TOKENIZER), chat_templates(model.files)
    template = templates.get("default")
    special = special_tokens(model.files)
    makes_own = "bos_token" in special and any(key in settings for key in ADDS)
    unclear = makes_own or "tokenizer.json" not in model.files or (bool(templates) and template is None)
    if unclear or not _names_tokens(settings, read_settings(model.files, SPECIAL), template or ""):
        return None
    tokens = added_tokens(model)
    texts = {token["id"]: token["content"] for token in tokens if token["id"] in ids}
    added = {token["content"] for token in tokens}
    if not added.issuperset(special.values()) or len(texts) < len(set(ids)):  # an ordinary one has another alphabet
        return None
    return ChatTokenizer(template, special, tuple(sorted(added)), texts, _adds_bos(model, special))


def _names_tokens(settings: Mapping[str, object], also: Mapping[str, object], template: str) -> bool:
    """Whether the files say what each special token is that matters here, so that no class has another one."""
    name = str(settings.get("tokenizer_class")).removesuffix("Fast")
    twice = settings.keys() & also.keys() & {*SPECIAL_TOKENS}
    used = {"eos_token", *re.findall(r"\b(?:bos|unk|sep|pad|cls|mask)_token\b", template)}
    used |= set() if name in WITHOUT_BOS else {"bos_token"}
    return (
        name in AS_IN_FILES
        and all(token_text(settings[key]) == token_text(also[key]) for key in twice)
        and used <= settings.keys() | also.keys()
        and used <= {*SPECIAL_TOKENS}
    )


def _adds_bos(model: ExportModel, special: Mapping[str, str]) -> bool:
    bos = special.get("bos_token")
    if bos is None:
        return False
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model.files["tokenizer.json"]))
    return bool(tokenizer.encode("a").ids[:1] == [tokenizer.token_to_id(bos)])


def _of_transformers(model: ExportModel, ids: Sequence[int]) -> ChatTokenizer:
    from transformers import AutoTokenizer

    with tokenizer_directory(model) as folder:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    known = [number for number in ids if 0 <= number < len(tokenizer)]
    bos = tokenizer.bos_token_id
    return ChatTokenizer(
        template=tokenizer.get_chat_template() if tokenizer.chat_template else None,
        special={key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)},
        added=tuple(map(str, tokenizer.get_added_vocab())),
        texts={number: str(tokenizer.decode([number], skip_special_tokens=False)) for number in known},
        adds_bos=bos is not None and tokenizer("a")["input_ids"][:1] == [bos],
    )
