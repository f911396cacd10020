"""Text to token ids as a server does it, in time that grows with the text and not with the number of its beginnings.

Tokenizers cut a text at its special tokens first and encode the parts apart. So a conversation that goes on keeps the
ids that it had up to its last special token, and a part that was seen before has the same ids again.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING, cast

from lora2serve.data.tokenizer import Tokenizer, encode

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

REMEMBERED_PARTS = 20_000  # of a few hundred bytes each
NOWHERE = re.compile(r"(?!)")
ANCHORS = ("\n", "a", ".", "0")


class TextEncoder:
    """Encodes texts that have their special tokens in them already."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._parts: dict[str, list[int]] = {}
        self._border: re.Pattern[str] | None = None
        self._start, self._start_ids = "", list[int]()  # of the last text, up to its last special token

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; the beginning that it shares with the text before costs nothing."""
        ids, rest = self._begin(text)
        parts = self._split(rest)
        *before, last = self._encode_parts(parts)
        for part in before:
            ids += part
        self._start, self._start_ids = text[: len(text) - len(parts[-1])], list(ids)
        return ids + last

    def prepare(self, text: str) -> None:
        """Encode the parts of a text at once, which are then known: of the longest of several beginnings."""
        self._encode_parts(self._split(text))

    def following(self, prompt: str, prompt_ids: list[int], answer: str) -> list[int]:
        """The ids of ``answer`` behind a prompt that was just encoded: a server keeps those of the prompt."""
        start = len(self._start) if self._start and prompt.startswith(self._start) else 0
        known = prompt_ids[len(self._start_ids) if start else 0 :]
        parts = self._encode_parts(self._split(prompt[start:] + answer))
        ids = [token for part in parts for token in part]
        return ids[len(known) :] if ids[: len(known)] == known else self.alone(answer)

    def alone(self, text: str) -> list[int]:
        """The ids of a text that stands behind another: without the space that SentencePiece puts before a text."""
        if not self._adds_space:
            return encode(self._tokenizer, text, special=False)
        for anchor in ANCHORS:
            before, both = (encode(self._tokenizer, part, special=False) for part in (anchor, anchor + text))
            if both[: len(before)] == before:
                return both[len(before) :]
        return encode(self._tokenizer, text, special=False)

    @cached_property
    def _adds_space(self) -> bool:
        lone, before, both = (encode(self._tokenizer, text, special=False) for text in ("a", "\n", "\na"))
        return lone != both[len(before) :]

    def _begin(self, text: str) -> tuple[list[int], str]:
        """What is known of the ids of a text, and the text that is left."""
        if self._start and text.startswith(self._start):
            return list(self._start_ids), text[len(self._start) :]
        return [], text

    def _split(self, text: str) -> list[str]:
        """Parts that each begin with a special token, apart from the first."""
        if self._border is None:
            self._border = self._find_border(text)
            parts = [token for part in self._encode_parts(self._split(text)) for token in part]
            if parts != encode(self._tokenizer, text, special=False):  # a tokenizer with rules of its own
                self._border, self._fast = NOWHERE, None
                self._parts.clear()
        places = [match.start() for match in self._border.finditer(text) if match.start()]
        return [text[start:stop] for start, stop in zip([0, *places], [*places, len(text)], strict=True)]

    def _find_border(self, text: str) -> re.Pattern[str]:
        """The special tokens of a first text, apart from those that take text beside them along."""
        added = self._tokenizer.added_tokens_decoder if self._fast else {}
        names = [
            token.content for token in added.values()
            if token.special and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
            and token.content in text
        ]  # fmt: skip
        return re.compile("|".join(re.escape(name) for name in names) or NOWHERE.pattern)

    def _encode_parts(self, parts: list[str]) -> list[list[int]]:
        missing = list({part: None for part in parts if part not in self._parts})
        if missing:
            if len(self._parts) > REMEMBERED_PARTS:
                self._parts.clear()
                missing = list(dict.fromkeys(parts))
            self._parts.update(zip(missing, self._encode_all(missing), strict=True))
        return [self._parts[part] for part in parts]

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        if self._fast is None:
            return [encode(self._tokenizer, text, special=False) for text in texts]
        return [found.ids for found in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def _fast(self) -> FastTokenizer | None:
        """The Rust tokenizer, which transformers has told by a first call to cut and pad nothing."""
        encode(self._tokenizer, "a", special=False)
        return cast("FastTokenizer | None", getattr(self._tokenizer, "backend_tokenizer", None))
