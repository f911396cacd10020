"""A port of Ollama's Modelfile grammar (``parser/parser.go``): what it would read, character by character.

The grammar knows no escapes. A value runs to the end of its line, or from ``\"\"\"`` (or ``"``) to the first end of a
line at which it ends so. Characters that Go's ``strconv.IsPrint`` refuses are dropped without a word.
"""

from __future__ import annotations

import unicodedata

COMMANDS = (
    "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message",
    "requires",
)  # fmt: skip
ROLES = ("system", "user", "assistant")
# api/types.go; None stands for a list, whose line may be repeated
PARAMETERS: dict[str, type[int] | type[float] | type[bool] | None] = {
    **dict.fromkeys(
        ("num_keep", "seed", "num_predict", "top_k", "repeat_last_n", "num_ctx", "num_batch", "num_gpu", "main_gpu",
         "num_thread", "draft_num_predict"), int,
    ),
    **dict.fromkeys(
        ("top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty", "frequency_penalty"), float
    ),
    "use_mmap": bool,
    "stop": None,
}  # fmt: skip
DEPRECATED = (
    "penalize_newline", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mlock", "mirostat", "mirostat_tau",
    "mirostat_eta",
)  # fmt: skip


class ModelfileError(ValueError):
    """What Ollama's parser would say."""


def parse(text: str) -> list[tuple[str, str]]:
    """Every command as (name, value); a parameter stands under its own name, a message as ``role: text``."""
    parser = _Parser()
    for character in text.removeprefix("\ufeff"):
        parser.take(character)
    return parser.end()


REPEATED = ("stop", "license", "message")  # commands that may stand several times


def settings(text: str) -> dict[str, object]:
    """The commands by name, numbers as numbers; ``stop`` in any order. ModelfileError where Ollama would refuse it.

    Any other command that stands there twice is a list as well: Ollama takes the files of every FROM.
    """
    lists: dict[str, list[str | float]] = {}
    for name, value in parse(text):
        lists.setdefault(name, []).append(float(value) if PARAMETERS.get(name) in (int, float) else value)
    lists["stop"] = sorted(lists.pop("stop", []), key=str)
    return {name: each if name in REPEATED or len(each) > 1 else each[0] for name, each in lists.items() if each}


def is_printable(character: str) -> bool:
    """Go's ``strconv.IsPrint``: letters, marks, numbers, punctuation, symbols, and the ASCII space."""
    return character == " " or unicodedata.category(character)[0] in "LMNPS"


class _Parser:
    """The states of the original, under its names but ``state``."""

    def __init__(self) -> None:
        self.commands: list[tuple[str, str]] = []
        self._state, self._buffer, self._name, self._role, self._line = "nil", "", "", "", 1

    def take(self, character: str) -> None:
        self._line += character in "\r\n"
        {
            "nil": self._nil, "name": self._in_name, "value": self._value, "parameter": self._parameter,
            "message": self._message, "comment": self._comment,
        }[self._state](character)  # fmt: skip

    def end(self) -> list[tuple[str, str]]:
        if self._state == "value":
            self._finish(_unquote(self._buffer))
        elif self._state not in ("nil", "comment"):
            raise ModelfileError("unexpected EOF")
        if not any(name == "from" for name, _ in self.commands):
            raise ModelfileError("no FROM line")
        return self.commands

    def _nil(self, character: str) -> None:
        if character == "#":
            self._state = "comment"
        elif character not in " \t\r\n":
            self._go("name")
            self._add(character)

    def _comment(self, character: str) -> None:
        if character in "\r\n":
            self._state = "nil"

    def _in_name(self, character: str) -> None:
        if _is_letter(character):
            self._add(character)
            return
        name = self._buffer.lower()
        if character not in " \t" or name not in COMMANDS:
            raise ModelfileError(f"(line {self._line}): command must be one of {', '.join(COMMANDS)}: {name!r}")
        self._name = name
        self._go(name if name in ("parameter", "message") else "value")

    def _parameter(self, character: str) -> None:
        if _is_letter(character) or character in "0123456789_":
            self._add(character)
            return
        if character not in " \t":
            raise ModelfileError(f"unexpected EOF: {self._buffer}")
        self._name = self._buffer
        if self._name not in (*COMMANDS, *PARAMETERS, *DEPRECATED):  # said later there, by FormatParams
            raise ModelfileError(f"(line {self._line}): unknown parameter {self._name!r}")
        self._go("value")

    def _message(self, character: str) -> None:
        if _is_letter(character):
            self._add(character)
            return
        if character not in " \t":
            raise ModelfileError(f"unexpected EOF: {self._buffer}")
        if self._buffer not in ROLES:
            raise ModelfileError(f"(line {self._line}): message role must be one of {', '.join(ROLES)}")
        self._role = self._buffer
        self._go("value")

    def _value(self, character: str) -> None:
        if character in "\r\n":
            whole = _unquote(self._buffer)
            if whole is not None:
                self._finish(whole)
                self._state = "nil"
                return
        if character in "\t\r\n" or is_printable(character):
            self._buffer += character

    def _finish(self, value: str | None) -> None:
        if value is None:
            raise ModelfileError(f"unexpected EOF: {self._buffer[:40]!r}")
        self.commands.append((self._name, f"{self._role}: {value}" if self._role else value))
        self._role = ""

    def _go(self, state: str) -> None:
        self._state, self._buffer = state, ""

    def _add(self, character: str) -> None:
        if is_printable(character):
            self._buffer += character


def _is_letter(character: str) -> bool:
    return character.isascii() and character.isalpha()


def _unquote(text: str) -> str | None:
    """The value without its quotes; None where they are not closed."""
    text = text.strip()
    for quote in ('"""', '"'):
        if text.startswith(quote):
            return text[len(quote) : -len(quote)] if len(text) >= 2 * len(quote) and text.endswith(quote) else None
    return text
