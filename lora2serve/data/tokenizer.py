"""The tokenizer of a model directory, as far as we use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, cast

from lora2serve.errors import TrainError, first_line


class MarkedToken(Protocol):
    """A token that is found in a text before the others; the switches are those of the tokenizers library."""

    content: str
    special: bool
    lstrip: bool
    rstrip: bool
    single_word: bool
    normalized: bool


class Tokenizer(Protocol):
    """A tokenizer of transformers."""

    chat_template: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None

    @property
    def special_tokens_map(self) -> Mapping[str, str]: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, MarkedToken]: ...

    def __len__(self) -> int: ...

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, list[int]]: ...

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        tokenize: Literal[False],
        add_generation_prompt: bool = False,
        **arguments: object,
    ) -> str: ...

    def get_chat_template(
        self, chat_template: str | None = None, tools: Sequence[Mapping[str, object]] | None = None
    ) -> str: ...

    def get_vocab(self) -> Mapping[str, int]: ...

    def add_tokens(self, new_tokens: Sequence[object]) -> int: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> Sequence[str]: ...

    def save_pretrained(self, save_directory: str) -> object: ...


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model directory, with something to pad with."""
    from transformers import AutoTokenizer

    try:
        tokenizer = cast("Tokenizer", AutoTokenizer.from_pretrained(str(path)))
    except (OSError, ValueError, KeyError) as error:
        raise TrainError(
            f"{path}: no tokenizer that transformers can load ({first_line(error)})",
            "name a directory with config.json, tokenizer.json and safetensors in model.path, or a Hub id",
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, *, special: bool = True) -> list[int]:
    """Token ids; ``special`` adds what the tokenizer puts around a text of its own, such as BOS."""
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def looks_special(token: str) -> bool:
    """Whether it is a control token by its form: some tokenizers forget to mark them so, and llama.cpp goes by that."""
    if token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    pairs = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return any(token.startswith(start) and token.endswith(end) for start, end in pairs)
