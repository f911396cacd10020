"""What a worker process does to hold a conversation: an engine that answers, and that can be stopped in mid-answer."""

from __future__ import annotations

import pkgutil
import signal
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import cast

from lora2serve.data.rows import Message
from lora2serve.errors import EngineError
from lora2serve.parity_check.engines import ENGINES
from lora2serve.parity_check.engines.chat_engine import AnswerOptions, ChatEngine, PromptEngine, has_template
from lora2serve.system.worker_protocol import Link

STOP = signal.SIGINT  # sent to this process alone: it is no part of the terminal's job


class StopAnswer(BaseException):
    """Ends an answer wherever the engine is; no library takes it for a failure of its own."""


class ChatWorker:
    """An engine by name, made by its options. Its public methods are the jobs."""

    def __init__(self, link: Link, engine: str, options: Mapping[str, object]) -> None:
        self._link = link
        self._engine: ChatEngine = pkgutil.resolve_name(ENGINES[engine])(**options)
        self._computing = False
        link.advance(0)

    def close(self) -> None:
        """End the engine where it has something to end."""
        if hasattr(self._engine, "close"):
            self._engine.close()

    def about(self) -> dict[str, str]:
        """The engine's ``version``, once its model is loaded, and a ``note`` of what the user should know of it."""
        engine, note = self._engine, ""
        served: Sequence[str] | None = getattr(engine, "served", None)  # of a server, which has its own template
        if served and len(served) > 1:
            note = f"it serves {', '.join(served)}: --url-model names another"
        elif served is None and not has_template(cast("PromptEngine", engine)):
            note = "no chat template: each question is continued as it stands, without those before it"
        return {"version": engine.version, "note": note}

    def reply(
        self, messages: Sequence[Mapping[str, object]], max_tokens: int | None, temperature: float | None, base: bool
    ) -> dict[str, str]:
        """Answer; each piece is a question to the parent, who says whether to go on.

        ``base``: by the model without its adapter. Returns ``end`` (stop, length or interrupted), or the ``error`` of
        an engine that takes no such conversation, with its ``hint``.
        """
        signal.signal(STOP, self._stop)
        engine = self._engine
        answer = engine.reply_base if base and hasattr(engine, "reply_base") else engine.reply
        try:
            self._computing = True
            end: str = answer(cast("Sequence[Message]", messages), AnswerOptions(max_tokens, temperature), self._say)
            self._computing = False
        except StopAnswer:
            end = "interrupted"
        except EngineError as error:
            return {"error": error.message, "hint": error.hint}
        finally:
            self._computing = False
        return {"end": end}

    def _say(self, text: str, *, thought: bool = False) -> None:
        self._computing = False  # a message is not broken off
        if not self._link.ask({"text": text, "thought": thought}):
            raise StopAnswer
        self._computing = True

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._computing:
            self._computing = False
            raise StopAnswer
