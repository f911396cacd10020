"""What an evaluation asks of an engine, whether that is in a process of its own or in this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict

from lora2serve.parity_check.engine_process import EngineProcess

Turns = Sequence[Mapping[str, object]]


class EngineAnswer(TypedDict, total=False):
    """An answer's ``text``, how it came to its ``end``, ``seconds``, those to its ``first`` words, and ``tokens``; or
    ``values``, the log-probabilities of texts; or the ``error`` of an engine that takes no such question.
    """

    text: str
    end: str
    seconds: float
    first: float
    tokens: int | None
    values: list[float]
    error: str
    hint: str


class Answerer(Protocol):
    """The jobs of ``AnswerWorker``; ``base``: of the model without its adapter."""

    def answer(self, messages: Turns, max_tokens: int, temperature: float, base: bool) -> EngineAnswer:
        """One answer."""
        ...

    def likelihoods(self, messages: Turns, texts: Sequence[str], base: bool) -> EngineAnswer:
        """The log-probability of each text as the whole beginning of an answer."""
        ...

    def first_tokens(self, messages: Turns, base: bool) -> dict[str, float]:
        """The likeliest first tokens of an answer with their log-probabilities; empty where the engine shows none."""
        ...


@dataclass(frozen=True)
class ProcessAnswerer:
    """The jobs, done by a worker process."""

    process: EngineProcess

    def answer(self, messages: Turns, max_tokens: int, temperature: float, base: bool) -> EngineAnswer:
        """See ``Answerer``."""
        result: EngineAnswer = self.process.call(
            "answer", messages=messages, max_tokens=max_tokens, temperature=temperature, base=base
        )
        return result

    def likelihoods(self, messages: Turns, texts: Sequence[str], base: bool) -> EngineAnswer:
        """See ``Answerer``."""
        result: EngineAnswer = self.process.call("likelihoods", messages=messages, texts=texts, base=base)
        return result

    def first_tokens(self, messages: Turns, base: bool) -> dict[str, float]:
        """See ``Answerer``."""
        result: dict[str, float] = self.process.call("first_tokens", messages=messages, base=base)
        return result


class TaskAnswerer(Protocol):
    """The jobs of ``HarnessWorker``, beside those of ``AnswerWorker``."""

    def only_text(self) -> bool:
        """Whether nobody here knows its tokens: then ``continue_words`` is all that it does."""
        ...

    def special_tokens(self) -> Mapping[str, int | None]:
        """``bos`` and ``eos`` of the vocabulary, and the ``longest`` text in tokens."""
        ...

    def encode(self, text: str, special: bool | None) -> list[int]:
        """Token ids; ``special``: with what the tokenizer puts before a text."""
        ...

    def render(self, messages: Turns, opening: bool) -> str | None:
        """A conversation by the engine's own template; None where it shows none."""
        ...

    def continuation(self, begun: Sequence[int], rest: Sequence[int], base: bool) -> tuple[float, bool]:
        """The log-probability of ``rest`` behind ``begun``, and whether it is the likeliest at each step."""
        ...

    def continue_text(self, ids: Sequence[int], new_tokens: int, base: bool) -> str:
        """The likeliest continuation in words."""
        ...

    def continue_words(self, text: str, turns: Turns, new_tokens: int, stops: Sequence[str]) -> str:
        """The same of ``text``, or the answer to ``turns`` where there are any."""
        ...


@dataclass(frozen=True)
class ProcessTaskAnswerer:
    """The jobs, done by a worker process."""

    process: EngineProcess

    def only_text(self) -> bool:
        """See ``TaskAnswerer``."""
        return bool(self.process.call("only_text"))

    def special_tokens(self) -> Mapping[str, int | None]:
        """See ``TaskAnswerer``."""
        result: Mapping[str, int | None] = self.process.call("special_tokens")
        return result

    def encode(self, text: str, special: bool | None) -> list[int]:
        """See ``TaskAnswerer``."""
        result: list[int] = self.process.call("encode", text=text, special=special)
        return result

    def render(self, messages: Turns, opening: bool) -> str | None:
        """See ``TaskAnswerer``."""
        result: str | None = self.process.call("render", messages=messages, opening=opening)
        return result

    def continuation(self, begun: Sequence[int], rest: Sequence[int], base: bool) -> tuple[float, bool]:
        """See ``TaskAnswerer``."""
        value, greedy = self.process.call("continuation", begun=begun, rest=rest, base=base)
        return value, greedy

    def continue_text(self, ids: Sequence[int], new_tokens: int, base: bool) -> str:
        """See ``TaskAnswerer``."""
        result: str = self.process.call("continue_text", ids=ids, new_tokens=new_tokens, base=base)
        return result

    def continue_words(self, text: str, turns: Turns, new_tokens: int, stops: Sequence[str]) -> str:
        """See ``TaskAnswerer``."""
        result: str = self.process.call("continue_words", text=text, turns=turns, new_tokens=new_tokens, stops=stops)
        return result
