"""``data.new_tokens``: texts that become tokens of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora2serve.data.tokenizer import Tokenizer, encode, looks_special
from lora2serve.errors import DataError, first_line, raise_all

if TYPE_CHECKING:
    from lora2serve.data.samples import Sample

KEY = "data.new_tokens"


@dataclass(frozen=True)
class NewTokens:
    """The texts, the id of each, and how many of the ids the tokenizer had before: those are the first."""

    texts: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    known: int = 0

    @property
    def rows(self) -> int:
        """Of an embedding that has them all, at least."""
        return max(self.ids, default=-1) + 1

    @property
    def added(self) -> tuple[str, ...]:
        """Those that the tokenizer did not have."""
        return self.texts[self.known :]

    def notes(self) -> Iterator[str]:
        """What was there already."""
        for text, number in list(zip(self.texts, self.ids, strict=True))[: self.known]:
            yield f"{KEY}: {text!r} is token {number} of the base already: its row is trained, and none is added"

    def warnings(self, samples: Sequence[Sample]) -> Iterator[str]:
        """What is not learned of the rows, and what is found where it may not be meant."""
        seen = Counter(token for sample in samples for token in sample.input_ids)
        if missing := [repr(text) for text, number in zip(self.texts, self.ids, strict=True) if not seen[number]]:
            yield f"{KEY}: {', '.join(missing)}: in no training row, so that nothing is learned of it"
        if words := [repr(text) for text in self.added if text[0].isalnum() and text[-1].isalnum()]:
            yield f"{KEY}: {', '.join(words)}: found inside longer words, too (put it in marks: <{words[0][1:-1]}>)"
        if hidden := [text for text in self.added if looks_special(text)]:
            names, shown = ", ".join(map(repr, hidden)), hidden[0].strip("<|>")
            yield (
                f"{KEY}: {names}: by its form a control token, which llama.cpp and Ollama show in no answer "
                f"(<{shown}> is shown)"
            )


NO_TOKENS = NewTokens()


def add_new_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> NewTokens:
    """Let ``tokenizer`` have each text as one token; DataError for all that it cannot have so."""
    from tokenizers import AddedToken

    before = tokenizer.get_vocab()
    known = [text for text in texts if text in before]
    added = [text for text in texts if text not in before]
    try:
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in added])
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise DataError(f"{KEY}: this tokenizer takes no tokens ({first_line(error)})", "leave it out") from error
    vocabulary = tokenizer.get_vocab()
    ids = {text: vocabulary[text] for text in (*known, *added)}
    raise_all(
        [problem for text, number in ids.items() for problem in _split(tokenizer, text, number)],
        lambda problems: DataError(problems, "choose a text that nothing else is a part of, such as <call>"),
    )
    return NewTokens(tuple(ids), tuple(ids.values()), len(known))


def _split(tokenizer: Tokenizer, text: str, number: int) -> Iterator[str]:
    """What becomes of the text, alone and between others, where it is not that token."""
    for around in (text, f"a{text}b", f"a {text} b", text + text):
        found = encode(tokenizer, around, special=False)
        if found.count(number) != around.count(text):
            pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(found)))
            yield f"{KEY}: {text!r} is token {number}, but {around!r} becomes {pieces}"
            return
    if tokenizer.decode([number]) != text:
        yield f"{KEY}: {text!r} is token {number}, which is read back as {tokenizer.decode([number])!r}"
