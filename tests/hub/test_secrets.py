"""A canary for a token: used at the Hub's own address, and found nowhere else. And what is shaped like one is not sent."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lora2serve.hub import fetch, push
from lora2serve.hub.secret_scan import find_secret, masked
from tests.hub.conftest import TOKEN, client_env, export
from tests.support.hub_server import HubServer

pytestmark = pytest.mark.engine

PROGRAM = "import lora2serve.hub.retry as r; r.WAITS = (0.0,) * 5; from lora2serve.cli import main; main()"
FAULTS = {
    "none": {},
    "down": {"endpoint": "commit", "status": 503, "times": 300},
    "forbidden": {"endpoint": "commit", "status": 403},
    "reset": {"endpoint": "commit", "kind": "reset", "times": 300},
    "refused": {"endpoint": "create", "status": 401, "headers": {"X-Error-Message": f"bad token {TOKEN}"}},  # it echoes
}


class Watch:
    """Looks at the command line of every process of this machine until it is left."""

    def __init__(self, needle: str) -> None:
        self.needle, self.looks, self.found = needle.encode(), 0, set[str]()
        self._done, self._thread = threading.Event(), threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.02):
            self.looks += 1
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    if self.needle in path.read_bytes():
                        self.found.add(path.parent.name)
                except OSError:  # it ended
                    continue


def leaks(said: str, folder: Path) -> list[str]:
    """Where the token is: in words, or in a file below ``folder``."""
    found = ["output"] if TOKEN in said else []
    files = (file for file in folder.rglob("*") if file.is_file())
    return found + [str(file) for file in files if TOKEN.encode() in file.read_bytes()]


def run(hub: HubServer, home: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *map(str, words)]
    return subprocess.run(
        command, env=client_env(hub, home), cwd=home.parent, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("words", [[], ["-v"]], ids=["plain", "verbose"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_token_is_nowhere(hub: HubServer, tmp_path: Path, words: list[str], fault: str) -> None:
    """Not in output, traceback, file or command line; uploads and addresses are looked at by the fixture."""
    path = export(tmp_path, "vllm")
    if FAULTS[fault]:
        hub.fail(**FAULTS[fault])  # type: ignore[arg-type]
    with Watch(TOKEN) as watch:
        done = run(hub, tmp_path / "home2", *words, "push", path, "--repo-id", "user/demo")
    assert (done.returncode == 0) == (fault == "none"), done.stderr
    assert not leaks(done.stdout + done.stderr, tmp_path)
    assert not watch.found and watch.looks > 3
    assert any(request.authorized for request in hub.requests), "the control: it was used"


def test_nor_after_a_pull(hub: HubServer, tmp_path: Path) -> None:
    push([export(tmp_path, "vllm")], repo_id="user/demo", private=True)
    for words in (["pull-check", "user/demo"], ["-v", "pull-check", "user/nothing"]):
        done = run(hub, tmp_path / "home2", *words)
        assert not leaks(done.stdout + done.stderr, tmp_path)


def test_the_controls(hub: HubServer, tmp_path: Path) -> None:
    """What the tests above look with does find a token: in words, in a file, in a command line, in an upload."""
    assert leaks(f"token {TOKEN}", tmp_path) == ["output"]
    (tmp_path / "log").write_text(f"Authorization: Bearer {TOKEN}")
    assert leaks("", tmp_path) == [str(tmp_path / "log")]
    with Watch(TOKEN) as watch:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)", TOKEN])
        child.wait()
    assert watch.found == {str(child.pid)}
    assert find_secret(TOKEN.encode()) == "a Hugging Face token"
    assert masked(f"bad token {TOKEN}!") == "bad token ***!"
    hub.add("org/model", {"config.json": b"{}"})
    fetch("org/model")
    assert all(TOKEN.encode() not in data for data in hub.received)
