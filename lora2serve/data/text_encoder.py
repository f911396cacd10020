"""Text to token ids as a server does it, in time that grows with what is new in it.

Tokenizers cut a text at its special tokens first and encode the parts apart; most cut a part before its words, too. So
a conversation that goes on keeps the ids that it had up to its last special token, and a part or a word that was seen
before has the same ids again.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable
from functools import cache, cached_property
from itertools import chain, product
from typing import TYPE_CHECKING, cast

from lora2serve.data.tokenizer import Tokenizer, encode

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

REMEMBERED_PARTS, REMEMBERED_WORDS = 20_000, 200_000  # of a few hundred bytes each, and of a hundred
NOWHERE = re.compile(r"(?!)")
WORD = re.compile(r"\s*\S+(?:[^\S ]\s*\S+)*(?:\s+\Z)?|\s+")  # ends before a space that follows something else
KINDS = ("a", "1", ".", "'", "\n", "é", "中", "\u0301")  # of characters that tokenizers tell apart, beside the space
ANCHORS = ("\n", "a", ".", "0")


class TextEncoder:
    """Encodes texts that have their special tokens in them already."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._parts: dict[str, list[int]] = {}
        self._words: dict[str, list[int]] = {}
        self._border: re.Pattern[str] | None = None

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``."""
        return _joined(self.encode_parts(self.split(text)))

    def prepare(self, text: str) -> None:
        """Encode a text whose beginnings come next: what it is made of is looked up at once."""
        self.encode_parts(self.split(text))

    def alone(self, text: str) -> list[int]:
        """The ids of a text that stands behind another: without the space that SentencePiece puts before a text."""
        if not self._adds_space:
            return encode(self._tokenizer, text, special=False)
        for anchor in ANCHORS:
            before, both = (encode(self._tokenizer, part, special=False) for part in (anchor, anchor + text))
            if both[: len(before)] == before:
                return both[len(before) :]
        return encode(self._tokenizer, text, special=False)

    def split(self, text: str) -> list[str]:
        """Parts that each begin with a special token, apart from the first."""
        if self._border is None:
            self._border = self._find_border(text)
            if self.encode(text) != encode(self._tokenizer, text, special=False):  # a tokenizer with rules of its own
                self._border, self._fast, self._cuts_words = NOWHERE, None, False
                self._parts.clear()
        places = [match.start() for match in self._border.finditer(text) if match.start()]
        return [text[start:stop] for start, stop in zip([0, *places], [*places, len(text)], strict=True)]

    def encode_parts(self, parts: list[str]) -> list[list[int]]:
        """The ids of each part that ``split`` gave."""
        known = self._parts
        missing = dict.fromkeys(part for part in parts if part not in known)
        if missing:
            if len(known) > REMEMBERED_PARTS:
                known.clear()
                missing = dict.fromkeys(parts)
            known.update(zip(missing, self._encode_new(list(missing)), strict=True))
        return [known[part] for part in parts]

    def _encode_new(self, parts: list[str]) -> list[list[int]]:
        if not self._cuts_words:
            return self._encode_all(parts)
        known, words = self._words, [WORD.findall(part) for part in parts]
        missing = list({word: None for part in words for word in part if word not in known})
        if len(known) + len(missing) > REMEMBERED_WORDS:
            known.clear()
            missing = list(dict.fromkeys(chain.from_iterable(words)))
        if missing:
            known.update(zip(missing, self._encode_all(missing), strict=True))
        return [_joined(map(known.__getitem__, part)) for part in words]

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        if self._fast is None:
            return [encode(self._tokenizer, text, special=False) for text in texts]
        return [found.ids for found in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

    def _find_border(self, text: str) -> re.Pattern[str]:
        """The special tokens of a first text, apart from those that take text beside them along."""
        added = self._tokenizer.added_tokens_decoder if self._fast else {}
        names = [
            token.content for token in added.values()
            if token.special and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
            and token.content in text
        ]  # fmt: skip
        return re.compile("|".join(re.escape(name) for name in names) or NOWHERE.pattern)

    @cached_property
    def _adds_space(self) -> bool:
        lone, before, both = (encode(self._tokenizer, text, special=False) for text in ("a", "\n", "\na"))
        return lone != both[len(before) :]

    @cached_property
    def _fast(self) -> FastTokenizer | None:
        """The Rust tokenizer, which transformers has told by a first call to cut and pad nothing."""
        encode(self._tokenizer, "a", special=False)
        return cast("FastTokenizer | None", getattr(self._tokenizer, "backend_tokenizer", None))

    @cached_property
    def _cuts_words(self) -> bool:
        """Whether each word of a text has ids of its own, whatever stands around it."""
        if self._fast is None or getattr(self._fast.model, "dropout", None):
            return False
        normalizer, added = self._fast.normalizer, self._tokenizer.added_tokens_decoder.values()
        if normalizer is not None and type(normalizer).__name__ != "NFC":  # which looks at no space
            return False
        if any(" " in token.content or token.lstrip or token.rstrip for token in added):
            return False
        try:
            return cuts_before_spaces(pickle.dumps(self._fast.pre_tokenizer))
        except Exception:  # of its own code, which somebody brought along
            return False


class GrowingText:
    """The ids of a conversation that goes on. They change at most behind its last special token."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._before, self._last = "", ""  # the text up to its last special token, and from there
        self._last_ids = list[int]()

    def begin(self, prompt: str) -> list[int]:
        """The ids of the first prompt."""
        self._before, self._last_ids = "", []
        ids = self._add(prompt)
        assert ids is not None, "nothing is here that it could differ from"
        return ids

    def go_on(self, prompt: str) -> list[int] | None:
        """The ids that a prompt has beyond those that are here; None where a server has other ids for what is here."""
        return self._add(prompt[len(self._before) :]) if prompt.startswith(self._before) else None

    def answer(self, answer: str) -> list[int]:
        """The ids of an answer behind the prompt: a server keeps those of the prompt."""
        added = self._add(self._last + answer)
        if added is None:
            added = self._encoder.alone(answer)
            self._last_ids = self._last_ids + added
        return added

    def _add(self, text: str) -> list[int] | None:
        """What ``text`` adds to the ids from the last special token on; None where it has others for those."""
        parts = self._encoder.split(text)
        encoded = self._encoder.encode_parts(parts)
        ids, here = _joined(encoded), len(self._last_ids)
        if ids[:here] != self._last_ids:
            return None
        self._before += "".join(parts[:-1])
        self._last, self._last_ids = parts[-1], encoded[-1]
        return ids[here:]


def _joined(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


@cache
def cuts_before_spaces(pre_tokenizer: bytes) -> bool:
    """Whether a pickled pre-tokenizer cuts before each space that follows something else, whatever is around it."""
    if (cutter := pickle.loads(pre_tokenizer)) is None:
        return False
    lasts = [kind for kind in KINDS if not kind.isspace()]
    for before in map("".join, product(["", *KINDS], lasts)):
        for after in map("".join, product([" ", *KINDS], ["", *KINDS])):
            pieces = cutter.pre_tokenize_str(f"{before} {after}")
            if len(before) not in (start for _, (start, _) in pieces):
                return False
    return True
