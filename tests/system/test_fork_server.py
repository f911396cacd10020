"""What one fork server does for several processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora2serve.system import fork_client
from tests.support import forked_worker
from tests.support.commands import light_fork_server

TESTS = """
import os

def test_forked():
    assert (os.getsid(0) == os.getpid()) == FORKED
    open(str(os.getpid()), "w").close()

def test_dies():
    os.kill(os.getpid(), 9)
"""


@pytest.fixture(scope="module", autouse=True)
def light_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with light_fork_server(tmp_path_factory.mktemp("server")):
        yield


def test_a_client_that_ends_in_the_middle(tmp_path: Path) -> None:
    """Its output is closed: whoever reads it waited for as long as the server ran."""
    client = fork_client.ForkClient()
    assert client.start("os:_exit", [0], [0, 1, 2], dict(os.environ))
    reading, writing = os.pipe()
    with socket.socket(socket.AF_UNIX) as connection, open(os.devnull, "rb") as nothing:
        connection.connect(client.path)
        socket.send_fds(connection, [b"+"], [nothing.fileno(), writing, writing, nothing.fileno()])
    os.close(writing)
    with open(reading, "rb") as output:
        assert output.read() == b""


@pytest.mark.parametrize("forked", [True, False])
def test_workers_of_xdist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: bool) -> None:
    """They are forked; one that dies is a failed test. Where the server refuses, a worker starts by itself."""
    server = fork_client.ForkClient()
    monkeypatch.setenv(fork_client.VARIABLE, server.path)
    (python,) = forked_worker.specs(["popen"])
    if not forked:
        monkeypatch.setenv("TZ", "UTC")  # another environment than the server's
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "test_it.py").write_text(TESTS.replace("FORKED", str(forked)))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "xdist", "-p", "no:cacheprovider", "--tx", python, "--dist", "load",
         "--max-worker-restart", "0", "-c", os.devnull, "--rootdir", tmp_path, "test_it.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env=dict(os.environ),  # as the server's: without what libraries written in C have set beside it
    )  # fmt: skip
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "crashed while running" in done.stdout
    assert os.getpid() not in {int(file.name) for file in tmp_path.iterdir() if file.name.isdigit()}
