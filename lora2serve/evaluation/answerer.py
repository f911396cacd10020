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
