"""The command line in a process of its own, forked from one that has the libraries loaded.

It is ``python -m lora2serve``: its words, folder, environment, output and exit code are, and nothing of ours but the
fork server was imported before. What differs is that torch, transformers and peft need not be read again. Tests that
start ``sys.executable`` themselves (memory, imports, an installed wheel) have the true one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lora2serve.system import fork_client
from lora2serve.system.fork_server import HARMLESS

ROOT = Path(__file__).parents[2]
Ask = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]


class RunningCommand:
    """``python -m lora2serve WORDS`` under way in ``folder``; by itself where the fork server refuses.

    changes: to the environment.
    """

    def __init__(self, words: Sequence[str], folder: Path, changes: Mapping[str, str] | None = None) -> None:
        self._words, self._environment = list(words), {**os.environ, **(changes or {})}
        self._out = tempfile.TemporaryFile()  # noqa: SIM115  closed at the end
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = self._forked(folder) or subprocess.Popen(
            [sys.executable, "-m", "lora2serve", *words], cwd=folder, env=self._environment,
            stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err, start_new_session=True,
        )  # fmt: skip

    def _forked(self, folder: Path) -> fork_client.ForkedProcess | None:
        server = fork_client.client()
        if server is None:
            return None
        os.environ[fork_client.VARIABLE] = server.path  # one for the whole session, also of what the command starts
        self._environment[fork_client.VARIABLE] = server.path
        with open(os.devnull, "rb") as nothing:
            return server.start(
                "runpy:run_module", ["lora2serve", None, "__main__", True],
                [nothing.fileno(), self._out.fileno(), self._err.fileno()], self._environment,
                argv=["", *self._words], folder=folder,
            )  # fmt: skip

    @property
    def ended(self) -> bool:
        """Whether it has an exit code."""
        try:
            self._process.wait(0)
        except subprocess.TimeoutExpired:
            return False
        return True

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def end(self, seconds: float | None = None) -> subprocess.CompletedProcess[str]:
        """What it has printed and its exit code, once it has ended; it is killed where that takes too long."""
        try:
            code = self._process.wait(seconds)
        except BaseException:  # a timeout of the test, Ctrl-C
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            raise
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read().decode())
            file.close()
        return subprocess.CompletedProcess(self._words, code, *texts)


def run_command(
    words: Sequence[str], folder: Path, changes: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``python -m lora2serve WORDS`` in ``folder``, from its beginning to its end; ``changes``: to the environment."""
    return RunningCommand(words, folder, changes).end()


def asking(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Ask:
    """The same in this process, for what is refused, or planned, before anything is loaded: no process is started."""
    from lora2serve.cli import run

    monkeypatch.chdir(folder)

    def ask(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        code = run(list(words))
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return ask


@contextmanager
def light_fork_server(folder: Path) -> Iterator[None]:
    """For a while a fork server as it is, but for the seconds that its libraries take."""
    script = folder / "light_server.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from lora2serve.system import fork_server;"
        "fork_server.LIBRARIES = ('decimal',); fork_server.main()"
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, setting in fork_client.SETTINGS.items():
            if not name.startswith(HARMLESS):  # its libraries have read them: it refuses whoever has others
                patch.setenv(name, setting)
        patch.delenv(fork_client.VARIABLE, raising=False)
        patch.setattr(fork_client, "_clients", [])
        patch.setattr(fork_client, "SCRIPT", script)
        yield
