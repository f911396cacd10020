"""The command line in a process of its own, forked from one that has the libraries loaded.

It is ``python -m lora2serve``: its words, folder, environment, output and exit code are, and nothing of ours but the
fork server was imported before. What differs is that torch, transformers and peft need not be read again. Tests that
start ``sys.executable`` themselves (signals, memory, imports, an installed wheel) have the true one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lora2serve.system import fork_client
from lora2serve.system.fork_server import HARMLESS

ROOT = Path(__file__).parents[2]


def run_command(
    words: Sequence[str], folder: Path, changes: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``python -m lora2serve WORDS`` in ``folder``; by itself where the fork server refuses.

    changes: to the environment.
    """
    environment = {**os.environ, **(changes or {})}
    server = fork_client.client()
    if server is not None:
        os.environ[fork_client.VARIABLE] = server.path  # one for the whole session, also of what the command starts
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull, "rb") as nothing:
            process = server.start(
                "runpy:run_module", ["lora2serve", None, "__main__", True],
                [nothing.fileno(), out.fileno(), err.fileno()], environment | {fork_client.VARIABLE: server.path},
                argv=["", *words], folder=folder,
            )  # fmt: skip
            if process is not None:
                code = _wait(process)
                texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
                return subprocess.CompletedProcess(words, code, *texts)
    command = [sys.executable, "-m", "lora2serve", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


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


def _wait(process: fork_client.ForkedProcess) -> int:
    try:
        return process.wait()
    except BaseException:  # a timeout of the test, Ctrl-C
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
