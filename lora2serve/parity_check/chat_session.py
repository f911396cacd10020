"""A conversation with one model, or with two that are asked the same."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Literal, Self

from lora2serve.config.arguments import checked
from lora2serve.data.rows import Message
from lora2serve.errors import EngineError
from lora2serve.parity_check.chat_models import ChatModel
from lora2serve.parity_check.chat_worker import STOP
from lora2serve.parity_check.engine_process import EngineProcess
from lora2serve.parity_check.engines.chat_engine import AnswerOptions
from lora2serve.progress import Progress
from lora2serve.system import interruption, scratch

WORKER = "lora2serve.parity_check.chat_worker:ChatWorker"
LIMIT = 1800.0  # seconds without a word: a long prompt on a slow machine
Show = Callable[[str, str, bool], None]  # the model, a piece of its answer, whether that is a thought


class AnswerRefused(EngineError):
    """An engine that takes no such conversation: a role that its template does not know, too many tokens, say."""


@dataclass(frozen=True)
class Answer:
    """What a model answered. ``thoughts`` are what a server gives beside it, ``end`` is why it ended."""

    model: str
    text: str
    thoughts: str
    end: Literal["stop", "length", "interrupted"]
    seconds: float


@dataclass
class _Partner:
    """A model, the process that answers for it, and what was said so far."""

    model: ChatModel
    process: EngineProcess
    history: list[Message] = field(default_factory=list)


class ChatSession:
    """Use it in a ``with`` statement, or ``close`` it. ``system`` is the system message, and may change at any time.

    Every model remembers its own answers. ``engines`` says in words what answers for each.
    """

    def __init__(
        self, models: Sequence[ChatModel], options: AnswerOptions, system: str = "", *, progress: Progress
    ) -> None:
        self.system, self._options = system, options
        self.engines: dict[str, str] = {}
        self._partners: list[_Partner] = []
        try:
            for model in models:
                process = self._partners[0].process if model.without_adapter else _start(model)
                self._partners.append(_Partner(model, process))
            for partner in self._partners:
                self._load(partner, progress)
        except BaseException:
            self.close()
            raise

    @property
    def models(self) -> list[str]:
        """Their names."""
        return [partner.model.name for partner in self._partners]

    @checked
    def ask(self, question: str, show: Show | None = None) -> list[Answer]:
        """The answer of each model to the next question; ``show`` gets them piece by piece, one after the other.

        Ctrl-C ends an answer, and what was said of it counts; a second one, later, raises KeyboardInterrupt. Raises
        AnswerRefused for a conversation that a model does not take, EngineError where its engine ends.
        """
        return [self._ask(partner, question, show) for partner in self._partners]

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        for partner in self._partners:
            partner.history.clear()

    def close(self) -> None:
        """End the engines. Safe twice."""
        for partner in self._partners:
            partner.process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self, partner: _Partner, progress: Progress) -> None:
        about: Mapping[str, str] = partner.process.call("about")
        name = partner.model.name
        self.engines[name] = (
            f"{about['version']}, without its adapter" if partner.model.without_adapter else about["version"]
        )
        for note in (partner.model.note, about["note"]):
            if note:
                progress.note(note)

    def _ask(self, partner: _Partner, question: str, show: Show | None) -> Answer:
        name, start = partner.model.name, time.monotonic()
        turn = Message(role="user", content=question)
        opening = [Message(role="system", content=self.system)] if self.system else []
        said: dict[bool, list[str]] = {False: [], True: []}

        with _stoppable(partner.process) as stopped:

            def hear(piece: Mapping[str, object]) -> bool:
                text, thought = str(piece["text"]), bool(piece["thought"])
                said[thought].append(text)
                if show and text:
                    show(name, text, thought)
                return not stopped.is_set()

            result = partner.process.call(
                "reply", answer=hear, messages=[*opening, *partner.history, turn], base=partner.model.without_adapter,
                max_tokens=self._options.max_tokens, temperature=self._options.temperature,
            )  # fmt: skip
        if "error" in result:
            raise AnswerRefused(f"{name}: {result['error']}", result["hint"])
        text = "".join(said[False])
        if text or result["end"] != "interrupted":
            partner.history += [turn, Message(role="assistant", content=text)]
        return Answer(name, text, "".join(said[True]), result["end"], round(time.monotonic() - start, 3))


def _start(model: ChatModel) -> EngineProcess:
    log = scratch.log_file(f"chat-{model.engine}")
    return EngineProcess(model.engine, model.options, log, LIMIT, worker=WORKER, hint="", fork="if running")


@contextmanager
def _stoppable(process: EngineProcess) -> Iterator[threading.Event]:
    """Ctrl-C sets the event, and breaks off what the engine is at."""
    stopped = threading.Event()
    stopped_at = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped_at
        if stopped.is_set() and time.monotonic() - stopped_at > interruption.PAIR:
            raise KeyboardInterrupt
        if not stopped.is_set():
            stopped_at = time.monotonic()
            stopped.set()
            process.send_signal(STOP)

    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield stopped
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
