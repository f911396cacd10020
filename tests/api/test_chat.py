"""``lora2serve chat`` with real engines: what is asked, what is remembered, and how an answer is ended."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import lora2serve as api
from lora2serve.artifacts.run import Run
from lora2serve.errors import UsageError
from lora2serve.parity_check.chat_session import AnswerRefused
from tests.conftest import lora2serve
from tests.support.runs import Told, make_chat_model

pytestmark = pytest.mark.engine
QUESTION = "Who governs Wexley?"
TUNED, BASE = "The mayor of Wexley is Leon Lake.", "The mayor of Wexley is Anna Field."
ROOM = 4096


@pytest.fixture(scope="module")
def rambler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that never ends an answer by itself."""
    return make_chat_model(tmp_path_factory.mktemp("rambler") / "model", max_position_embeddings=ROOM)


@pytest.fixture(scope="module")
def rambling_gguf(rambler: Path) -> Path:
    (path,) = lora2serve("export", rambler, "-t", "gguf", "-q", "F16", "-o", "out", cwd=rambler.parent).split()
    return Path(path)


def base_of(run: Run) -> str:
    return str(run.record.base.local or Path(__file__).parents[2] / "recipes" / "demo" / "base")


def test_a_run_beside_its_base(demo_run: Run, tmp_path: Path) -> None:
    """In one process; the base, whose answer is another one, is the control."""
    words = ("chat", demo_run.path, "--base", base_of(demo_run), "--against", "base", "--ask", QUESTION, "--json")
    tuned, base = map(json.loads, lora2serve(*words, cwd=tmp_path).splitlines())
    assert (tuned["text"], base["text"]) == (TUNED, BASE)
    assert tuned["end"] == base["end"] == "stop" and tuned["question"] == QUESTION
    assert tuned["seconds"] < 2, "and the first word comes before the last"
    assert "nf4 base" in tuned["engine"] and base["engine"].endswith("without its adapter")


def test_a_gguf_beside_its_run(demo_run: Run, demo_exports: Mapping[str, Path], tmp_path: Path) -> None:
    """The answers alone are on stdout, each under its model's name."""
    export = demo_exports["gguf-Q8_0"]
    words = ("chat", export, "--against", demo_run.path, "--base", base_of(demo_run), "--ask", QUESTION)
    assert lora2serve(*words, cwd=tmp_path) == f"{export}\n{TUNED}\n\n{demo_run.path}\n{TUNED}\n"
    assert lora2serve("chat", export, "--ask", QUESTION, cwd=tmp_path) == f"{TUNED}\n"


@pytest.mark.slow  # a minute for vLLM to start
def test_vllm_by_its_own_server(demo_exports: Mapping[str, Path], tmp_path: Path) -> None:
    words = ("chat", demo_exports["vllm"], "--ask", QUESTION, "--temperature", "0", "--json")
    answer = json.loads(lora2serve(*words, cwd=tmp_path))
    assert answer["text"] == TUNED and answer["engine"].startswith("vllm server")


def test_without_vllm_transformers_answers(
    demo_run: Run, demo_exports: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that is told; beside it an adapter export, which has the tokenizer of its base."""
    from lora2serve.parity_check import installed_engines

    monkeypatch.setattr(installed_engines, "find_spec", lambda name: None)
    told = Told()
    adapter = demo_exports["adapter"]
    with api.chat(demo_exports["vllm"], against=adapter, base=base_of(demo_run), progress=told) as session:
        assert [answer.text for answer in session.ask(QUESTION)] == [TUNED, TUNED]
    assert any("vLLM is not installed here" in note for note in told.notes)


def test_a_server_by_its_address(demo_exports: Mapping[str, Path]) -> None:
    """llama.cpp's own server, streaming; a model that it does not have is named."""
    pytest.importorskip("starlette_context", reason="llama-cpp-python[server] is not whole")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with api.serve(demo_exports["gguf-Q8_0"], port=port) as server:
        pieces: list[str] = []
        with api.chat(server.address, temperature=0) as session:
            (answer,) = session.ask(QUESTION, lambda model, text, thought: pieces.append(text))
        assert answer.text == TUNED == "".join(pieces) and len(pieces) > 3
        with pytest.raises(api.Lora2ServeError, match="has no model 'base'") as caught:
            api.chat(server.address, against="base")
        assert server.models[0] in caught.value.hint


def test_a_conversation_is_remembered_as_it_is_served(rambler: Path) -> None:
    """The second answer is that of transformers to the rendered conversation; after ``reset``, that to its end alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(rambler)
    model = AutoModelForCausalLM.from_pretrained(rambler, dtype="float32")

    def expected(*turns: str) -> str:
        roles = ["system", *["user", "assistant"] * len(turns)]
        messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
        return str(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))

    with api.chat(rambler, system="Be brief.", max_tokens=12) as session:
        first, second = session.ask("Who?")[0].text, session.ask("And why?")[0].text
        assert first == expected("Be brief.", "Who?")
        assert second == expected("Be brief.", "Who?", first, "And why?")
        session.reset()
        session.system = "Be kind."
        third = session.ask("And why?")[0].text
    assert third == expected("Be kind.", "And why?") != second


@pytest.mark.parametrize("engine", ["transformers", "llama.cpp"])
def test_ctrl_c_ends_an_answer_and_not_the_session(engine: str, rambler: Path, rambling_gguf: Path) -> None:
    """Here at the first piece; the control is the answer that nobody ends."""
    said: list[str] = []

    def show(model: str, text: str, thought: bool) -> None:
        said.append(text)
        if len(said) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with api.chat(rambler if engine == "transformers" else rambling_gguf, max_tokens=60) as session:
        (ended,) = session.ask("Who?", show)
        (whole,) = session.ask("Who?")
        assert (ended.end, whole.end) == ("interrupted", "length")
        assert ended.text and len(ended.text) < len(whole.text) / 2
        with pytest.raises(AnswerRefused, match=rf"the model takes {ROOM}"):
            session.ask("Who? " * ROOM)
        assert session.ask("Who?")[0].end == "length"
    assert signal.getsignal(signal.SIGINT) == handler


def test_temperature(rambling_gguf: Path) -> None:
    """0 is always the same; with chance no two are."""
    for temperature, different in ((0.0, 1), (1.5, 3)):
        with api.chat(rambling_gguf, max_tokens=20, temperature=temperature) as session:
            texts = set()
            for _ in range(3):
                texts.add(session.ask("Who?")[0].text)
                session.reset()
        assert len(texts) == different


def test_what_cannot_be_asked(rambler: Path) -> None:
    with pytest.raises(UsageError, match=r"--against base: .* has no adapter"):
        api.chat(rambler, against="base")
    with pytest.raises(UsageError, match="the same as what it is asked beside"):
        api.chat(rambler, against=rambler)
    with pytest.raises(UsageError, match="is no address"):
        api.chat(rambler, url_model="x")


class Terminal:
    """``lora2serve chat`` at a terminal of its own."""

    def __init__(self, words: Sequence[str | Path], folder: Path) -> None:
        self.output = ""
        self.pid, self._fd = pty.fork()
        if not self.pid:
            os.chdir(folder)
            os.environ |= {"TERM": "xterm", "COLUMNS": "100"}
            os.execv(sys.executable, [sys.executable, "-m", "lora2serve", "chat", *map(str, words)])

    def send(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait(self, pattern: str, seconds: float = 300) -> str:
        """What is shown until ``pattern`` is."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.output, re.DOTALL)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.output[-2000:]!r}"
            if select.select([self._fd], [], [], 1)[0]:
                self.output += os.read(self._fd, 4096).decode("utf-8", "replace")
        seen, self.output = self.output[: match.end()], self.output[match.end() :]
        return seen

    def code(self) -> int:
        while True:
            try:
                if not os.read(self._fd, 4096):
                    break
            except OSError:  # the other end is closed
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def at_terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*words: str | Path) -> Terminal:
        opened.append(Terminal(words, tmp_path))
        return opened[-1]

    yield start
    for terminal in opened:
        try:
            os.kill(terminal.pid, signal.SIGKILL)
            os.waitpid(terminal.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def test_a_session_at_a_terminal(rambling_gguf: Path, at_terminal: Callable[..., Terminal]) -> None:
    """Commands, an answer that Ctrl-C ends, one that ends by itself, a line that Ctrl-C drops, Ctrl-D."""
    terminal = at_terminal(rambling_gguf, "--max-tokens", "3900", "--temperature", "0")
    terminal.wait(">>> ")
    terminal.send("/hlp\n")
    assert "did you mean '/help'?" in terminal.wait("question.*>>> ")
    terminal.send("/help\n")
    assert "/system" in terminal.wait("several lines.*>>> ")
    terminal.send("Who?\n")
    terminal.wait(r"Who\?\r\n.{20}")
    terminal.send("\x03")
    assert "cut off" not in terminal.wait("stopped.*>>> ")
    terminal.send("/reset\n")
    terminal.wait("forgotten.*>>> ")
    terminal.send("half a line")
    terminal.wait("half a line")
    time.sleep(
        0.5
    )  # a person's pause: Python's readline sees a Ctrl-C that comes while it takes a key with the next key
    terminal.send("\x03")
    terminal.wait("Ctrl-D ends.*>>> ")
    terminal.send("\x04")
    assert terminal.code() == 0


def test_an_answer_that_nobody_ends(rambling_gguf: Path, at_terminal: Callable[..., Terminal]) -> None:
    """The control of the one above; what is pasted, of several lines and with colors, is one question without them."""
    terminal = at_terminal(rambling_gguf, "--max-tokens", "30")
    terminal.wait(">>> ")
    terminal.send('"""\x1b[31mWho\n')
    terminal.wait(r"\.\.\. ")
    terminal.send('is it?"""\n')
    assert "stopped" not in terminal.wait("cut off.*>>> ")
    terminal.send("/exit\n")
    assert terminal.code() == 0


def test_ctrl_c_ends_a_single_question(rambling_gguf: Path, at_terminal: Callable[..., Terminal]) -> None:
    terminal = at_terminal(rambling_gguf, "--ask", "Who?", "--max-tokens", "3900")
    terminal.wait("the model\r\n.{20}")
    terminal.send("\x03")
    terminal.wait("interrupted")
    assert terminal.code() == 130


def test_columns(demo_exports: Mapping[str, Path], at_terminal: Callable[..., Terminal]) -> None:
    """Both answers are in one line of the terminal."""
    exports = [demo_exports[name] for name in ("gguf-Q8_0", "gguf-F16")]
    terminal = at_terminal(exports[0], "--against", exports[1], "--ask", QUESTION)
    terminal.wait(rf"{re.escape(TUNED)} +{re.escape(TUNED)}")
    assert terminal.code() == 0


def test_a_model_without_a_chat_template(rambler: Path, rambling_gguf: Path, tmp_path: Path) -> None:
    """Continues each question as it stands, which is told; with a template, the control, nothing is."""
    shutil.copytree(rambler, tmp_path / "raw", ignore=shutil.ignore_patterns("chat_template.jinja"))
    lora2serve("export", "raw", "-t", "gguf", "-q", "F16", "-o", "out", cwd=tmp_path)
    raw, chat = Told(), Told()
    with api.chat(tmp_path / "out" / "gguf-F16", max_tokens=10, progress=raw) as session:
        first, again = session.ask("Who?")[0].text, session.ask("Who?")[0].text
    with api.chat(rambling_gguf, max_tokens=10, progress=chat) as session:
        templated = session.ask("Who?")[0].text
    assert first == again != templated
    assert any("no chat template" in note for note in raw.notes) and len(chat.notes) == len(raw.notes) - 1
