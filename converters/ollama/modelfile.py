"""The Modelfile: written, then read back by a port of Ollama's grammar (``parser/parser.go``) and compared.

The grammar knows no escapes. A value runs to the end of its line, or from ``\"\"\"`` to the first line that ends with
``\"\"\"``. Characters that Go's ``strconv.IsPrint`` refuses are dropped without a word.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field

from lora2serve.errors import ExportError

COMMANDS = (
    "from",
    "license",
    "template",
    "system",
    "adapter",
    "parameter",
    "message",
    "renderer",
    "parser",
    "requires",
    "draft",
)
NUMBERS = {  # generation_config.json -> PARAMETER
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip
Value = str | int | float


@dataclass(frozen=True)
class Modelfile:
    """What we write; ``stop`` becomes one line each."""

    model: str  # path of the GGUF, relative
    template: str | None = None
    system: str | None = None
    parameters: dict[str, Value] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    adapter: str | None = None
    requires: str | None = None

    def commands(self) -> Iterator[tuple[str, str]]:
        """As (name, value), a parameter under its own name."""
        yield "from", self.model
        for name in ("adapter", "template", "system"):
            value = getattr(self, name)
            if value is not None:
                yield name, value
        yield from ((name, _number(value)) for name, value in self.parameters.items())
        yield from (("stop", text) for text in self.stop)
        if self.requires:
            yield "requires", self.requires

    def write(self) -> str:
        """The text; ExportError where Ollama would read something else."""
        lines = [_line(name, value) for name, value in self.commands()]
        text = "".join(f"{line}\n" for line in lines)
        for (name, value), read in zip(self.commands(), parse(text), strict=True):
            if read != (name, value):
                raise ExportError(
                    f"Modelfile: Ollama would read {name} {value!r} as {read[1]!r}",
                    "use --target gguf, and a GGUF's own template",
                )
        return text


class ModelfileError(ValueError):
    """What Ollama's parser would say."""


def parse(text: str) -> list[tuple[str, str]]:
    """Every command as (name, value); a parameter stands under its own name, a message as ``role: text``."""
    found: list[tuple[str, str]] = []
    rest = text.removeprefix("\ufeff")
    while rest := rest.lstrip(" \t\r\n"):
        if rest.startswith("#"):
            rest = rest[_end_of_line(rest) :]
            continue
        name, rest = _word(rest)
        if name.lower() not in COMMANDS:
            raise ModelfileError(f"command must be one of {', '.join(COMMANDS)}: {name!r}")
        name, role = name.lower(), ""
        if name == "parameter":
            name, rest = _word(rest, digits=True)
        elif name == "message":
            role, rest = _word(rest)
        value, rest = _value(rest)
        found.append((name, f"{role}: {value}" if role else value))
    if not any(name == "from" for name, _ in found):
        raise ModelfileError("no FROM line")
    return found


def is_printable(character: str) -> bool:
    """Go's ``unicode.IsPrint``: letters, marks, numbers, punctuation, symbols, and the ASCII space."""
    return character == " " or unicodedata.category(character)[0] in "LMNPS"


def _line(name: str, value: str) -> str:
    if name in ("from", "adapter", "requires"):
        return f"{name.upper()} {value}"
    if name in ("template", "system"):
        return f'{name.upper()} """{value}"""'
    return f"PARAMETER {name} {value if name != 'stop' else _quoted(value)}"


def _quoted(value: str) -> str:
    return f'"""{value}"""' if '"' in value else f'"{value}"'


def _number(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _word(text: str, digits: bool = False) -> tuple[str, str]:
    """Letters (digits and underscores too in a parameter's name) up to exactly one blank."""
    end = 0
    while (
        end < len(text)
        and text[end].isascii()
        and (text[end].isalpha() or (digits and (text[end].isdigit() or text[end] == "_")))
    ):
        end += 1
    if end == 0 or end == len(text) or text[end] not in " \t":
        raise ModelfileError(f"expected a word and one space, not {text[: end + 1]!r}")
    return text[:end], text[end + 1 :]


def _value(text: str) -> tuple[str, str]:
    """The value and what follows its line: the first end of line at which it is whole."""
    at = 0
    while True:
        at += _end_of_line(text[at:])
        whole = _unquote(_kept(text[:at]).strip())
        if whole is not None:
            return whole, text[at:]
        if at >= len(text):
            raise ModelfileError(f"unexpected EOF: {text[:40]!r}")
        at += 1


def _kept(text: str) -> str:
    return "".join(c for c in text if c in "\t\r\n" or is_printable(c))


def _unquote(text: str) -> str | None:
    if not text:
        return None
    for quote in ('"""', '"'):
        if text.startswith(quote):
            return text[len(quote) : -len(quote)] if len(text) >= 2 * len(quote) and text.endswith(quote) else None
    return text


def _end_of_line(text: str) -> int:
    ends = [place for place in (text.find("\n"), text.find("\r")) if place >= 0]
    return min(ends, default=len(text))
