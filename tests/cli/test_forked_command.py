"""The tests' quick way to run a command is a true run of it: beside `python -m lora2serve`, nothing differs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora2serve.system import fork_client
from tests.support.commands import light_fork_server, run_command


@pytest.fixture(scope="module", autouse=True)
def light_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with light_fork_server(tmp_path_factory.mktemp("server")):
        yield


def true_run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lora2serve", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


# what fails with words on stderr, and what writes a file; what only prints and another failure are like them
COMMANDS = [["exprot"], ["init"]]
LIKE_THEM = [pytest.param(words, marks=pytest.mark.engine) for words in (["--help"], ["-v", "inspect", "./nowhere"])]


@pytest.mark.parametrize("words", [*COMMANDS, *LIKE_THEM], ids=" ".join)
def test_it_is_a_true_run(words: list[str], tmp_path: Path) -> None:
    """Exit code, stdout and stderr, in a folder with a module of its own that `python -m` finds first."""
    folders = [tmp_path / "true", tmp_path / "forked"]
    for folder in folders:
        folder.mkdir()
    expected, forked = true_run(words, folders[0]), run_command(words, folders[1])
    assert (forked.returncode, forked.stdout, forked.stderr) == (expected.returncode, expected.stdout, expected.stderr)
    assert [path.name for path in folders[0].iterdir()] == [path.name for path in folders[1].iterdir()]


def test_it_is_forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: it looked at a fork; switched off, it is one no more."""
    plugin = tmp_path / "lib" / "spy" / "click.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text("import sys, os\nprint(sorted(sys.modules)); print(os.getcwd()); os._exit(7)\n")
    monkeypatch.setenv("PYTHONPATH", f"{plugin.parent}:{Path(__file__).parents[2]}")
    monkeypatch.setattr(fork_client, "_clients", [])  # a server with that path, too
    monkeypatch.delenv(fork_client.VARIABLE, raising=False)
    for value, forked in ((None, True), (fork_client.OFF, False)):
        with monkeypatch.context() as patch:
            if value is not None:
                patch.setenv(fork_client.VARIABLE, value)
            done = run_command(["exprot"], tmp_path)
        assert done.returncode == 7
        modules, folder = done.stdout.splitlines()
        assert ("lora2serve.system.fork_server" in modules) == forked
        assert folder == str(tmp_path)


@pytest.mark.engine
def test_json_of_a_command(tmp_path: Path) -> None:
    findings = json.loads(run_command(["doctor", "--json"], tmp_path).stdout)
    assert findings == json.loads(true_run(["doctor", "--json"], tmp_path).stdout)
