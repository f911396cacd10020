"""The Modelfile: written, then read back by the port of Ollama's grammar and compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from converters.ollama.modelfile_parser import PARAMETERS, ModelfileError, is_printable, parse
from lora2serve.errors import ExportError

PARAMETER_NAMES = {  # generation_config.json -> PARAMETER
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip
ParameterValue = str | int | float
HINT = "use --target gguf, and the GGUF's own template"


@dataclass(frozen=True)
class Modelfile:
    """What we write; ``stop`` becomes one line each."""

    model: str  # path of the GGUF, relative; or what to lay an adapter on
    template: str | None = None
    system: str | None = None
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
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
        written = list(self.commands())
        text = "".join(f"{_line(name, value)}\n" for name, value in written)
        try:
            read = parse(text)
        except ModelfileError as error:
            raise ExportError(f"Modelfile: Ollama would not read it: {_one_line(error)}", HINT) from None
        for (name, value), (other, other_value) in zip(written, read, strict=False):
            if (other, other_value) != (name, value):
                lost = "".join(sorted({c for c in value if c not in "\t\r\n" and not is_printable(c)}))
                why = f" (it drops {lost!a})" if lost else ""
                raise ExportError(
                    f"Modelfile: Ollama would read {name} {value!r} as {other} {other_value!r}{why}", HINT
                )
        if len(read) != len(written):
            raise ExportError(f"Modelfile: Ollama would read {len(read)} commands, written were {len(written)}", HINT)
        return text

    def params(self) -> dict[str, ParameterValue | list[str]]:
        """The Hub's side file of that name."""
        return {**self.parameters, **({"stop": list(self.stop)} if self.stop else {})}


def _line(name: str, value: str) -> str:
    if name in ("from", "adapter", "requires"):
        return f"{name.upper()} {value}"
    if name in ("template", "system"):
        return f'{name.upper()} """{value}"""'
    return f"PARAMETER {name} {value if PARAMETERS.get(name) else _quoted(value)}"


def _quoted(value: str) -> str:
    return f'"""{value}"""' if '"' in value else f'"{value}"'


def _number(value: ParameterValue) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
