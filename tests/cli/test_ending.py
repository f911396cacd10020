"""A command that is asked to end leaves nothing: no file, no folder, no process; what a killed one leaves, the next removes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from lora2serve.system import fork_client, scratch
from lora2serve.system.fork_client import ForkClient, ForkedProcess

pytestmark = pytest.mark.engine

BASE = Path(__file__).parents[2] / "recipes" / "demo" / "base"
EXPORT = ("export", "model", "-t", "vllm", "-t", "ollama", "-q", "Q8_0", "-o", "deep/out")
PARITY = ("parity", "model", "ready/vllm", "--engine", "transformers", "--report", "report")
ENDINGS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@dataclass(frozen=True)
class Place:
    """A folder in which everything lies that its commands can make, and the server that they are forked from."""

    root: Path
    server: ForkClient
    durations: dict[Sequence[str], float] = field(default_factory=dict)

    def start(self, words: Sequence[str]) -> ForkedProcess:
        with open(os.devnull, "rb") as nothing, (self.root.parent / "said").open("wb") as out:
            descriptors = [nothing.fileno(), out.fileno(), out.fileno()]
            environment = {**os.environ, **fork_client.SETTINGS, fork_client.VARIABLE: self.server.path}
            process = self.server.start(
                "runpy:run_module", ["lora2serve", None, "__main__", True], descriptors, environment,
                argv=["", *words], folder=self.root,
            )  # fmt: skip
        assert process is not None
        return process

    def run(self, words: Sequence[str]) -> None:
        assert self.start(words).wait(300) == 0, (self.root.parent / "said").read_text()

    def files(self) -> set[Path]:
        return set(self.root.rglob("*"))

    def processes(self) -> list[psutil.Process]:
        """All that were started with this folder as TMPDIR, but for the server."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                ours = process.environ().get("TMPDIR") == str(self.root / "tmp")
                running = process.status() != psutil.STATUS_ZOMBIE
                found += [process] if ours and running and process.pid != self.server._server.pid else []
        return found

    def wait_until_alone(self, seconds: float) -> list[str]:
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [" ".join(process.cmdline()) for process in left]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("ending") / "root"
    for name in ("tmp", "home"):
        (root / name).mkdir(parents=True)
    (root / "model").symlink_to(BASE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(root / "tmp"))
        patch.setenv("HOME", str(root / "home"))
        patch.delenv("XDG_CACHE_HOME", raising=False)
        patch.delenv(fork_client.VARIABLE, raising=False)
        place = Place(root, ForkClient())
        place.run(["export", "model", "-t", "vllm", "-o", "ready"])
        yield place


def duration(place: Place, words: Sequence[str], made: str) -> float:
    """Seconds that the whole command takes, measured once; what it makes goes again."""
    for _ in range(2 if words not in place.durations else 0):  # the first one reads its modules from the disk
        started = time.monotonic()
        place.run(words)
        place.durations[words] = time.monotonic() - started
        assert (place.root / made).exists()
        shutil.rmtree(place.root / made)
    return place.durations[words]


@pytest.mark.parametrize(
    ("words", "made"),
    [pytest.param(EXPORT, "deep", id="export"), pytest.param(PARITY, "report", id="parity", marks=pytest.mark.slow)],
)
def test_nothing_is_left(place: Place, words: Sequence[str], made: str) -> None:
    """At six moments of a real export and of a real parity run, by each of the signals.

    That a parity run that is ended leaves no file and no child, the last test of these has for one moment.
    """
    seconds, before = duration(place, words, made), place.files()
    met = seen = 0
    for number in range(6):
        process = place.start(words)
        time.sleep(seconds * (number + 0.5) / 6)
        seen += place.files() != before
        with suppress(ProcessLookupError):  # it was quicker this time
            os.kill(process.pid, ENDINGS[number % 3])
        code = process.wait(60)
        assert code in (0, 130, -ENDINGS[number % 3]), "or it was at its first imports"
        met += code == 130
        assert place.wait_until_alone(1) == [], number
        assert (place.root / made).exists() == (code == 0), number
        if code == 0:
            shutil.rmtree(place.root / made)
        assert place.files() == before, number
    assert met >= 2 and seen >= 1, "the control: it was under way, and had files"


@pytest.mark.parametrize(("words", "made"), [(EXPORT, "deep"), (PARITY, "report")], ids=["export", "parity"])
def test_the_next_command_sweeps(place: Place, words: Sequence[str], made: str) -> None:
    seconds, before = duration(place, words, made), place.files()
    for number in range(3):
        process = place.start(words)
        deadline = time.monotonic() + 120
        while place.files() == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(seconds * number / 8)
        with suppress(ProcessLookupError):  # it was quicker this time
            os.kill(process.pid, signal.SIGKILL)
        if process.wait(60) == 0:
            shutil.rmtree(place.root / made)
        else:
            assert place.files() != before, "the control: a kill leaves something"
        place.run(["inspect", "model"])
        assert place.wait_until_alone(8) == [], number
        assert place.files() == before, number


def test_a_living_one_is_left_alone(place: Place) -> None:
    """Its lock tells: another command sweeps beside it, and it ends well."""
    process = place.start(EXPORT)
    for _ in range(600):
        if list(place.root.glob("deep/out/*.partial-*")):
            break
        time.sleep(0.02)
    place.run(["inspect", "model"])
    assert process.wait(300) == 0
    assert (place.root / "deep/out/vllm/lora2serve.json").is_file()
    shutil.rmtree(place.root / "deep")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_of_its_own(place: Place, number: signal.Signals) -> None:
    """``python -m lora2serve`` with a fork server of its own, met while that loads its libraries."""
    before = place.files()
    environment = {name: value for name, value in os.environ.items() if name != scratch.VARIABLE}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "lora2serve", *PARITY], cwd=place.root, env=environment, stderr=subprocess.PIPE
    )
    while len(place.processes()) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == (130 if number == signal.SIGTERM else -number)
    if number == signal.SIGKILL:
        assert place.files() != before, "the control"
        place.run(["inspect", "model"])
    assert place.wait_until_alone(1) == []
    assert place.files() == before
