"""What is typed and what is shown, without a model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from lora2serve import console
from lora2serve.cli import run
from lora2serve.cli.chat_terminal import COMMAND, clean
from lora2serve.data.rows import Message
from lora2serve.errors import EngineError
from lora2serve.parity_check.engines.chat_engine import AnswerOptions, TokenText, prompt
from lora2serve.parity_check.engines.openai_engine import OpenAI
from lora2serve.system.http import ConnectionLost
from tests.support.manifests import write_export
from tests.support.raw_server import CLOSE, RawServer, Step, answer, head


@pytest.mark.parametrize(
    ("pasted", "asked"),
    [
        ("plain, é 東京 🙂\tand a tab", "plain, é 東京 🙂\tand a tab"),
        ("\x1b[200~two\r\nlines\x1b[201~", "two\nlines"),
        ("\x1b[1;31mred\x1b[0m \x9b2Jcleared", "red cleared"),
        ("\x1b]0;a title\x07text \x1b]8;;http://x\x1b\\link", "text link"),
        ("a\x1bcb\x1b(Bc", "abc"),
        ("bell\x07 back\x08 delete\x7f", "bell back delete"),
        ("half \udcff a byte", "half \ufffd a byte"),
        ("[31m is text", "[31m is text"),
    ],
)
def test_orders_to_a_terminal_are_not_asked(pasted: str, asked: str) -> None:
    assert clean(pasted) == asked


def test_nor_do_they_leave_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    console.answer_piece("\x1b]0;title\x07\x1b[2J\r\u202egone")
    assert capsys.readouterr().out == "\\x1b]0;title\\x07\\x1b[2J\\r\\u202egone"
    console.answer_piece("a thought", dim=True)
    assert capsys.readouterr().out == "", "stdout is no terminal here: it gets the answer alone"


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("/exit", ("/exit", None)),
        ("/system Be brief.", ("/system", "Be brief.")),
        ("/etc/hosts?", None),
        (" /exit", None),
    ],
)
def test_commands(line: str, parts: tuple[str, str | None] | None) -> None:
    match = COMMAND.fullmatch(line)
    assert (match and match.groups()) == parts


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--ask", "x"], 2, "no runs/latest here"),
        (["nothing", "--ask", "x"], 1, "nothing"),
        (["--ask", " "], 2, "--ask: empty"),
        (["--ask", "x", "--temperature", "-1"], 2, "--temperature -1: expected a number from 0"),
        (["--ask", "x", "--max-tokens", "0"], 2, "--max-tokens 0: expected at least 1"),
        (["http://x?key=1", "--ask", "x"], 2, "an address with a query"),
        (["localhost:8000", "--ask", "x"], 2, "an address is http://localhost:8000"),
        (["bundle", "--url-model", "x", "--ask", "x"], 2, "--url-model x: bundle is no address"),
        (["bundle", "--ask", "x"], 2, "a bundle of 1 adapters, expected one model"),
        (["ollama-adapter", "--ask", "x"], 2, "an adapter for Ollama, which no other engine opens"),
        (["file.gguf", "--ask", "x"], 2, "file.gguf: not a run, export, adapter or model"),
        (["gguf-adapter", "--ask", "x"], 2, "an adapter for llama.cpp, without its base"),
    ],
)
def test_words_and_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], args: list[str], code: int,
    said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for target in ("bundle", "ollama-adapter", "gguf-adapter"):
        write_export(tmp_path / target, target, bundle=("a",) if target == "bundle" else ())
    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    assert run(["chat", *args]) == code
    out, err = capfd.readouterr()
    assert said in err and not out and "Traceback" not in err


@pytest.mark.parametrize("text", ["Grüße aus Köln, 東京 🙂👨‍👩‍👧 fin", "  two  spaces\n\n\tand lines", ""])
def test_tokens_become_the_text_that_they_are(text: str) -> None:
    """Tokens of one byte each, so that characters come in parts: none is shown before it is whole."""
    words = TokenText(lambda ids: bytes(ids).decode("utf-8", "replace"))
    pieces = [words.add(byte) for byte in text.encode()]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert words.rest() == ""
    assert [words.add(byte) for byte in "é".encode()[:1]] == [""] and words.rest() == "\ufffd"


@pytest.mark.parametrize(
    ("tokens", "shown", "stopped"),
    [
        (["An answer", ".", "\nUs", "er:", " more"], "An answer.", True),
        (["An answer\nUser: more"], "An answer", True),
        (["A", "\nUs", "ed car", "\nU"], "A\nUsed car\nU", False),
    ],
)
def test_a_stop_word_is_no_part_of_an_answer(tokens: list[str], shown: str, stopped: bool) -> None:
    """Nor is its beginning shown before one knows that it is none."""
    words = TokenText(lambda ids: "".join(tokens[number] for number in ids), ["\nUser:"])
    pieces = []
    for number in range(len(tokens)):
        pieces.append(words.add(number))
        if words.stopped:
            break
    assert "".join([*pieces, words.rest()]) == shown
    assert words.stopped == stopped


# bytes that are no text are asked about as a sign that stands for them; in an empty pipe, the control, is no question
PIPED = ((b"half \xff a byte", "no runs/latest here"), (b"", "nothing was piped in"))


def test_bytes_that_are_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for piped, said in PIPED:
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(piped), encoding="utf-8", errors="strict"))
        assert run(["chat"]) == 2 and said in capfd.readouterr().err


@pytest.mark.engine
def test_a_pipe_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    """The same with a true one."""
    for piped, said in PIPED:
        command = [sys.executable, "-m", "lora2serve", "chat"]
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as in most locales
        done = subprocess.run(command, check=False, input=piped, capture_output=True, cwd=tmp_path, env=environment)
        assert done.returncode == 2 and said in done.stderr.decode()


class _Wordless:
    """An engine whose chat template writes nothing, as one may that knows no such role."""

    def __init__(self, text: str) -> None:
        self._text = text

    def render(self, messages: Sequence[Message]) -> str:
        return self._text

    def prompt_ids(self, messages: Sequence[Message], text: str) -> list[int]:
        return list(self._text.encode())


def test_a_template_that_writes_nothing_is_told() -> None:
    question = [Message(role="user", content="Who?")]
    assert prompt(_Wordless("a"), question, 8) == [97], "the control"
    with pytest.raises(EngineError, match="no token"):
        prompt(_Wordless(""), question, 8)


PIECE = b'data: {"choices": [{"delta": {"content": "Leon"}, "finish_reason": %s}]}\n\n'


@pytest.mark.parametrize(
    ("sent", "end"),
    [
        (PIECE % b"null" + PIECE % b'"stop"', "stop"),
        (PIECE % b"null" + PIECE % b'"length"' + b"data: [DONE]\n\n", "length"),
        (PIECE % b"null" + PIECE % b"null" + b"data: [DONE]\n\n", "stop"),
        (PIECE % b"null" + PIECE % b"null", None),
    ],
)
def test_a_server_whose_answer_breaks_off(sent: bytes, end: str | None) -> None:
    """Half an answer is none, where the connection ends it without a word; with a reason or a last word it is whole."""

    def steps(request: str, body: bytes) -> list[Step]:
        if request.startswith("GET"):
            return answer({"data": [{"id": "m"}]})
        return [head(200, {"Content-Type": "text/event-stream"}), sent, CLOSE]

    said: list[str] = []

    def say(text: str, *, thought: bool = False) -> None:
        said.append(text)

    with RawServer(steps) as server:
        engine = OpenAI(server.url, "")
        with nullcontext() if end else pytest.raises(ConnectionLost):
            assert engine.reply([Message(role="user", content="Who?")], AnswerOptions(), say) == end
    assert said == ["Leon", "Leon"]
