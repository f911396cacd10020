"""A server as a child: waited for, ended with every process it started, and its log read when it ends by itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lora2serve.errors import EngineError
from lora2serve.progress import Silent
from lora2serve.serving import server_process
from lora2serve.serving.server import ServerCommand
from tests.support.ports import free_port

CHILD = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
ANSWERS = (
    "import http.server, sys\n"
    "class Handler(http.server.BaseHTTPRequestHandler):\n"
    "    def do_GET(self):\n"
    "        self.send_response(200 if self.path == '/health' else 404)\n"
    "        self.end_headers()\n"
    "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()"
)
SILENT = "import time; time.sleep(600)"


def command(script: str, port: int | None = None) -> ServerCommand:
    port = port or free_port()
    return ServerCommand("vllm", (sys.executable, "-c", script, str(port)), ("base",), "127.0.0.1", port)


@pytest.fixture(autouse=True)
def asked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "PAUSES", ())
    monkeypatch.setattr(server_process, "LONGEST_PAUSE", 0.05)


class Heard(Silent):
    """Keeps the notes; ``then`` is called once with the first that has ``word`` in it."""

    def __init__(self, word: str = "", then: Callable[[], object] = lambda: None) -> None:
        self.notes: list[str] = []
        self._word, self._then = word, then

    def note(self, text: str) -> None:
        self.notes.append(text)
        if self._word and self._word in text:
            self._word = ""
            self._then()


def send(number: int) -> Callable[[], object]:
    """A signal to this process, a moment later."""
    return threading.Timer(0.1, os.kill, (os.getpid(), number)).start


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before, handlers = set(psutil.pids()), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    for _ in range(250):
        if not (left := sleepers(before)):
            return
        time.sleep(0.02)
    pytest.fail(f"left behind: {left}")


def sleepers(before: set[int]) -> list[int]:
    """Processes of these tests that run."""
    running = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.pid not in before and "time.sleep(600)" in " ".join(process.cmdline())
            running += [process.pid] if ours and process.status() != psutil.STATUS_ZOMBIE else []
    return running


def test_the_control_one_that_is_left_is_seen() -> None:
    before = set(psutil.pids())
    with subprocess.Popen([sys.executable, "-c", SILENT]) as process:
        assert sleepers(before) == [process.pid]
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_what_it_started(number: signal.Signals) -> None:
    heard = Heard("curl", send(number))
    server = command(CHILD + ANSWERS)
    assert server_process.run(server, heard) == 0
    assert f"{server.address} serves base" in heard.notes
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_starts(number: signal.Signals) -> None:
    heard = Heard("starting", send(number))
    assert server_process.run(command(CHILD + SILENT), heard) == 0
    assert not [note for note in heard.notes if "serves" in note]


def test_one_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM does not while it waits for a process of its own that has ended already."""
    monkeypatch.setattr(server_process, "PATIENCE", 0.4)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    started = time.monotonic()
    assert server_process.run(command(deaf + CHILD + ANSWERS), Heard("curl", send(signal.SIGTERM))) == 0
    assert 0.4 < time.monotonic() - started < 30


def test_adapters_are_named_with_their_base() -> None:
    heard = Heard("curl", send(signal.SIGINT))
    server = replace(command(ANSWERS), models=("base", "mine"), base="org/model@abc")
    assert server_process.run(server, heard) == 0
    assert f"{server.address} serves base, mine (base is org/model@abc)" in heard.notes


def test_one_that_ends_by_itself() -> None:
    """The reason is in its log; the control is one that has no reason to give."""
    with pytest.raises(EngineError, match=r"vllm ended with code 1: ValueError: no KV cache here") as caught:
        server_process.run(command("raise ValueError('no KV cache here')"), Silent())
    assert caught.value.hint.startswith("shorten it with -- --max-model-len N")
    with pytest.raises(EngineError, match="code 3: nothing in its log") as caught:
        server_process.run(command("raise SystemExit(3)"), Silent())
    assert caught.value.hint.startswith("its log: ")


def test_its_exit_code_once_it_served() -> None:
    script = ANSWERS.replace(
        "self.end_headers()", "self.end_headers(); import os, threading; threading.Timer(0.1, os._exit, (7,)).start()"
    )
    assert server_process.run(command(script), Silent()) == 7


def test_one_that_never_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(server_process, "READY", 0.3)
    with pytest.raises(EngineError, match=r"vllm did not answer within 0\.3 s"):
        server_process.run(command(CHILD + SILENT), Silent())
    with pytest.raises(EngineError, match=r"vllm did not answer within 0\.3 s"):
        server_process.start(command(SILENT), tmp_path / "log")


def test_start_gives_the_process(tmp_path: Path) -> None:
    process = server_process.start(command(ANSWERS), tmp_path / "log")
    assert process.poll() is None
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=f"port {port} on 127.0.0.1: Address already in use"):
            server_process.run(command(ANSWERS, port), Silent())
