"""A conversation in a terminal: what is typed, and what is shown of the answers.

Nothing that a model says reaches the terminal as a command to it, and nothing of the kind that is pasted reaches the
model.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from lora2serve import console
from lora2serve.errors import EngineError, did_you_mean

if TYPE_CHECKING:
    from lora2serve.parity_check.chat_session import Answer, ChatSession
    from lora2serve.progress import Progress

PROMPT, CONTINUED, FENCE = ">>> ", "... ", '"""'
COMMANDS: Mapping[str, str] = {
    "/help": "show this",
    "/reset": "forget what was said",
    "/system": "TEXT: set the system message; without TEXT, remove it",
    "/exit": "end, as Ctrl-D does; Ctrl-C ends an answer",
}
COMMAND = re.compile(r"(/[a-z]+)(?:\s+(.*))?", re.DOTALL)
# what terminals take for orders (ECMA-48): CSI and OSC sequences, two-character escapes, other controls
ORDERS = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b\\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\\\|\x9c)?|\x1b[ -/]*[0-~]?"
    "|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


class LineDropped(Exception):
    """Ctrl-C while a line is typed."""


def clean(text: str) -> str:
    """What was typed or pasted, without orders to a terminal and without bytes that are no text."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return ORDERS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def show_answers(session: ChatSession, question: str, progress: Progress) -> list[Answer]:
    """Ask, and show the answers as they come: in columns where there are two and the terminal has room."""
    if len(session.models) > 1 and console.Columns.fit():
        with console.Columns(session.models) as columns:
            answers = session.ask(question, columns.add)
    else:
        answers = _show_in_turn(session, question)
    for answer in answers:
        if answer.end == "length":
            progress.note(f"{answer.model}: cut off: by --max-tokens, or at the end of its context")
    return answers


def _show_in_turn(session: ChatSession, question: str) -> list[Answer]:
    """One below the other, each under its name; one alone without."""
    speaker = ""

    def show(model: str, text: str, thought: bool) -> None:
        nonlocal speaker
        if model != speaker and len(session.models) > 1:
            if speaker:
                console.answer_piece("\n\n")
            console.heading(model)
        speaker = model
        console.answer_piece(text, dim=thought)

    try:
        answers = session.ask(question, show)
    except EngineError:
        if speaker:  # what was said of the answer stays, and the error has a line of its own
            console.answer_piece("\n")
        raise
    console.answer_piece("\n")
    return answers


class TypedChat:
    """What a person types, until Ctrl-D."""

    def __init__(self, session: ChatSession, progress: Progress) -> None:
        self._session, self._progress = session, progress

    def hold(self) -> None:
        """Read and answer until the person ends it."""
        import readline  # noqa: F401  # by it input() edits a line, takes a paste of several whole, and remembers them

        for name, engine in self._session.engines.items():
            self._progress.note(f"{name}: {engine}")
        self._progress.note("/help shows what can be typed beside questions; Ctrl-D ends")
        with _ctrl_c_drops_the_line():
            try:
                while self._turn():
                    pass
            except EOFError:
                console.answer_piece("\n")

    def _turn(self) -> bool:
        """One line and what follows from it; False at the end. EOFError for Ctrl-D."""
        try:
            line = _read()
            command = COMMAND.fullmatch(line.rstrip())
            if command:
                return self._obey(command[1], (command[2] or "").strip())
            if line.strip():
                self._answer(line.strip())
        except LineDropped:
            console.answer_piece("\n")
            self._progress.note("Ctrl-D ends")
        return True

    def _answer(self, question: str) -> None:
        from lora2serve.parity_check.chat_session import AnswerRefused

        try:
            answers = show_answers(self._session, question, self._progress)
        except AnswerRefused as problem:
            console.error(problem)
            return
        if any(answer.end == "interrupted" for answer in answers):
            self._progress.note("stopped")

    def _obey(self, command: str, text: str) -> bool:
        if command == "/exit":
            return False
        if command == "/help":
            for name, effect in COMMANDS.items():
                self._progress.note(f"{name:8} {effect}")
            self._progress.note(f"{FENCE:8} begins and ends a question of several lines")
        elif command == "/reset":
            self._session.reset()
            self._progress.note("forgotten; the system message stays" if self._session.system else "forgotten")
        elif command == "/system":
            self._session.system = text
            self._progress.note("the system message is set" if text else "no system message")
        else:
            near = did_you_mean(command, COMMANDS)
            self._progress.note(f"no command {command}{near}; with a space before it, it is a question")
        return True


@contextmanager
def _ctrl_c_drops_the_line() -> Iterator[None]:
    def drop(number: int, frame: FrameType | None) -> None:
        raise LineDropped

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, drop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _read() -> str:
    """The next line, or the lines between two fences."""
    line = clean(_line(PROMPT))
    if not line.startswith(FENCE):
        return line
    text = line.removeprefix(FENCE)
    while FENCE not in text:
        text += "\n" + clean(_line(CONTINUED))
    return " " + text.partition(FENCE)[0].strip()  # whatever it is, it is no command


def _line(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)  # stdout carries the answers
    return input()
