"""What an engine must do to hold a conversation: answer as it serves, word by word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from lora2serve.data.rows import Message
from lora2serve.errors import EngineError, first_line

LONGEST_ANSWER = 1024  # tokens, where neither the user nor the model's own settings say how many
End = Literal["stop", "length"]  # the model ended by itself, or there was no room for more


class Say(Protocol):
    """Gets each piece of an answer; a ``thought`` is not part of what is said. What it raises ends the answer."""

    def __call__(self, text: str, *, thought: bool = False) -> None: ...


@dataclass(frozen=True)
class AnswerOptions:
    """None leaves it to the model's own settings. ``temperature`` 0 takes the likeliest token each time."""

    max_tokens: int | None = None
    temperature: float | None = None


class ChatEngine(Protocol):
    """An engine with one model in it that answers."""

    version: str

    def reply(self, messages: Sequence[Message], options: AnswerOptions, say: Say) -> End:
        """The answer to a conversation, by the engine's own template; EngineError where it takes none such."""
        ...


class PromptEngine(Protocol):
    """An engine that is fed ids."""

    def render(self, messages: Sequence[Message]) -> str | None: ...

    def prompt_ids(self, messages: Sequence[Message], text: str) -> list[int] | None: ...


def prompt(engine: PromptEngine, messages: Sequence[Message], most: int) -> list[int]:
    """The ids of a conversation with the opening of an answer; without a template, those of its last turn alone.

    EngineError where the template refuses it or writes nothing, or where it leaves no room for an answer in ``most``
    tokens.
    """
    try:
        chat = messages if has_template(engine) else []
        ids = engine.prompt_ids(chat, str(messages[-1]["content"])) or []
    except Exception as error:  # a template raises what it likes to refuse a role
        raise EngineError(f"the chat template refuses this conversation: {first_line(error)}") from error
    if not ids:
        raise EngineError("the conversation has no token, once its chat template has written it")
    if len(ids) >= most:
        raise EngineError(f"the conversation has {len(ids)} tokens, the model takes {most}", "begin a new one")
    return ids


def has_template(engine: PromptEngine) -> bool:
    """Whether the engine writes a conversation by a chat template."""
    try:
        return engine.render([Message(role="user", content="Hello")]) is not None
    except Exception:  # one that raises is one
        return True


class TokenText:
    """Tokens in words as they come: what each adds to the text, held back while a character is not whole.

    The text of a token depends on those before it, so that a few of them are put in words again with each. ``stops``
    are words that end the text, and are no part of it: ``stopped`` says that one came.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, stops
        self._ids: list[int] = []
        self.stopped = False
        self._start = self._shown = 0  # where the words begin that are repeated, and those that are new

    def add(self, token: int) -> str:
        """The words that ``token`` brings; often none."""
        self._ids.append(token)
        text = self._new()
        self.stopped = any(stop in text for stop in self._stops)
        begun = any(text.endswith(stop[:length]) for stop in self._stops for length in range(1, len(stop)))
        if not text or text.endswith("\ufffd") or begun or self.stopped:
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text

    def rest(self) -> str:
        """What was held back, up to a word that ends the text."""
        text = self._new()
        return text[: min([len(text), *(text.find(stop) for stop in self._stops if stop in text)])]

    def _new(self) -> str:
        before = self._decode(self._ids[self._start : self._shown])
        return self._decode(self._ids[self._start :])[len(before) :]
