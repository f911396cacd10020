"""What a GGUF or a Modelfile sets for answers, apart from chance: penalties, stops, length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora2serve.errors import Lora2ServeError
from lora2serve.exporting import settings_plan


@dataclass(frozen=True)
class OwnSampling:
    """The defaults are those of llama.cpp and of Ollama."""

    repeat: float = 1.0  # what the logit of a repeated token is divided by
    last: int = 64  # tokens that are looked at for it, of prompt and answer
    presence: float = 0.0
    frequency: float = 0.0
    length: int | None = None  # tokens of an answer
    stops: tuple[str, ...] = ()

    def most(self, new_tokens: int) -> int:
        """Tokens of an answer where ``new_tokens`` are wanted."""
        return min(self.length, new_tokens) if self.length and self.length > 0 else new_tokens


def of_gguf(metadata: Mapping[str, str]) -> OwnSampling:
    """What llama-server takes over from a file."""
    return OwnSampling(
        repeat=float(metadata.get("general.sampling.penalty_repeat", 1.0)),
        last=int(metadata.get("general.sampling.penalty_last_n", 64)),
    )


def differ(modelfile: Path, gguf: Path) -> bool:
    """Whether a Modelfile sets something for answers that the file it runs does not; its end tokens are in both."""
    try:
        own, header = of_modelfile(modelfile), settings_plan.read_gguf(gguf)
    except (OSError, ValueError, Lora2ServeError):  # the settings gate says so
        return False
    tokens = header.get("tokenizer.ggml.tokens")
    known = {*tokens.value} if tokens and isinstance(tokens.value, tuple) else set()
    in_file = of_gguf({key: str(entry.value) for key, entry in header.items() if key.startswith("general.sampling.")})
    return replace(own, stops=()) != in_file or not known.issuperset(own.stops)


def of_modelfile(path: Path) -> OwnSampling:
    """What Ollama takes over from a Modelfile; ValueError where it would not read it."""
    values = settings_plan.read_modelfile(path.read_text(encoding="utf-8"))
    stops = values.get("stop")

    def number(name: str, default: float) -> float:
        value = values.get(name)
        return value if isinstance(value, float) else default

    return OwnSampling(
        repeat=number("repeat_penalty", 1.0),
        last=int(number("repeat_last_n", 64)),
        presence=number("presence_penalty", 0.0),
        frequency=number("frequency_penalty", 0.0),
        length=int(number("num_predict", 0)) or None,
        stops=tuple(map(str, stops)) if isinstance(stops, list) else (),
    )
