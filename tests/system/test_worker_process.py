"""Worker processes: answers, errors, crashes and hangs; forked or started by themselves; never left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora2serve.errors import EngineError
from lora2serve.system import fork_client, scratch, worker_process, worker_protocol
from lora2serve.system.fork_server import state
from lora2serve.system.worker_process import WorkerProcess
from tests.support.commands import light_fork_server

ROOT = Path(__file__).parents[2]
WORKER = """
import os, sys, time
from pathlib import Path

class Odd(Exception):
    message, hint = "odd", "make it even"

class Worker:
    def __init__(self, link, fail=False):
        self.link = link
        if fail:
            raise Odd
    def double(self, number):
        if number % 2:
            raise Odd
        self.link.advance(number)
        return 2 * number
    def bytes(self, values):
        return {"long": values * 1000, "short": [values, values[:0]]}
    def ask(self):
        return "we say " + self.link.ask("what?")
    def eof(self):
        raise EOFError("of a file")
    def exit(self):
        print("last words", flush=True)
        os._exit(7)
    def sleep(self, started):
        Path(started).write_text(str(os.getpid()))
        time.sleep(600)
    def facts(self):
        return {"path": sys.path, "folder": os.getcwd(), "forked": "lora2serve.system.fork_server" in sys.modules, "group": os.getpgid(0),
                "pid": os.getpid(), "set": os.environ.get("LORA2SERVE_TEST"), "name": Path("/proc/self/comm").read_text()}
    def close(self):
        print("closed", flush=True)
"""


@pytest.fixture
def worker(tmp_path: Path) -> str:
    path = tmp_path / "some_worker.py"
    path.write_text(WORKER)
    return f"{path}:Worker"


@pytest.fixture(scope="module", autouse=True)
def light_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A fork server as it is, but for the seconds that its libraries take."""
    with light_fork_server(tmp_path_factory.mktemp("server")):
        yield


@pytest.fixture(params=[False, True], ids=["by itself", "forked"])
def fork(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def start(worker: str, tmp_path: Path, fork: bool, limit: float | None = 60, **options: object) -> WorkerProcess:
    process = WorkerProcess("some worker", worker, options, tmp_path / "log", limit, fork="always" if fork else "never")
    assert isinstance(process._process, fork_client.ForkedProcess) == fork
    return process


def gone(pid: int) -> bool:
    """It has ended, whether or not somebody has asked for its exit code: an orphan's new parent may take seconds."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_results(worker: str, tmp_path: Path, fork: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA2SERVE_TEST", "of this test")
    advanced: list[int] = []
    with start(worker, tmp_path, fork) as process:
        assert process.call("double", advanced.append, number=4) == 8 and advanced == [4]
        answer = process.call("bytes", values=b"\x00\xff\n" * 100)
        assert answer == {"long": b"\x00\xff\n" * 100_000, "short": [b"\x00\xff\n" * 100, b""]}
        assert process.call("ask", answer=lambda question: f"{question} that") == "we say what? that"
        facts = process.call("facts")
        assert facts["group"] == facts["pid"] != os.getpgid(0)
        assert facts["folder"] == str(Path.cwd()) and "" not in facts["path"]
        assert facts["set"] == "of this test" and facts["name"].strip() == "some worker"
        assert facts["forked"] == fork
    assert (tmp_path / "log").read_text().splitlines() == ["closed"], "it ends by itself, and tidies up"
    assert gone(facts["pid"])


def test_what_fails_here_is_not_the_worker(worker: str, tmp_path: Path) -> None:
    """An answer that cannot be given, as of a pipe that nobody reads: the worker has not died, and ends by itself."""

    def no_reader(_: object) -> str:
        raise BrokenPipeError(32, "Broken pipe")

    with start(worker, tmp_path, False) as process, pytest.raises(BrokenPipeError):
        process.call("ask", answer=no_reader)
    with start(worker, tmp_path, False) as process, pytest.raises(EngineError, match="died"):
        process.call("exit")


def test_nothing_is_imported_from_the_current_folder(
    worker: str, tmp_path: Path, fork: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(tmp_path)
    with start(worker, tmp_path, fork) as process:
        assert process.call("double", number=2) == 4
    control = subprocess.run([sys.executable, "-c", "import json"], capture_output=True, check=False, cwd=tmp_path)
    assert b"imported from the current folder" in control.stderr


def test_errors(worker: str, tmp_path: Path, fork: bool) -> None:
    with start(worker, tmp_path, fork) as process, pytest.raises(EngineError, match=r"^some worker: odd$") as error:
        process.call("double", number=3)
    assert error.value.hint == "make it even"
    with start(worker, tmp_path, fork, fail=True) as process, pytest.raises(EngineError, match=r"^some worker: odd$"):
        process.call("double", number=2)
    with start(worker, tmp_path, fork) as process, pytest.raises(EngineError, match="EOFError: of a file"):
        process.call("eof")
    assert "Traceback" in (tmp_path / "log").read_text(), "the log has more than the message"


def test_a_worker_that_dies(worker: str, tmp_path: Path, fork: bool) -> None:
    with start(worker, tmp_path, fork) as process, pytest.raises(EngineError, match=r"exit code 7\): last words"):
        process.call("exit")
    with start(worker, tmp_path, fork) as process:
        os.kill(process.call("facts")["pid"], signal.SIGSEGV)
        with pytest.raises(EngineError, match=r"died \(signal SIGSEGV\)"):
            process.call("double", number=2)


def test_a_signal_to_the_worker_alone(worker: str, tmp_path: Path, fork: bool) -> None:
    """As a scheduler sends to every process of a job: it tidies up, and its parent says why there is no answer."""
    for end in (signal.SIGTERM, signal.SIGHUP):
        with start(worker, tmp_path, fork) as process:
            os.kill(process.call("facts")["pid"], end)
            with pytest.raises(EngineError, match=r"some worker died \(exit code 130\): closed"):
                process.call("double", number=2)
        assert "closed" in (tmp_path / "log").read_text()


def test_a_worker_that_hangs(worker: str, tmp_path: Path, fork: bool) -> None:
    with start(worker, tmp_path, fork, limit=None) as process:
        pid = process.call("facts")["pid"]
        process.limit = 0.2
        with pytest.raises(EngineError, match="no response for 0 s"):
            process.call("sleep", started=tmp_path / "started")
    assert gone(pid)


def test_an_interrupt_ends_it(worker: str, tmp_path: Path, fork: bool) -> None:
    """As Ctrl-C does: whatever it is at is broken off, and its ``close`` is run."""

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), start(worker, tmp_path, fork) as process:
        pid = process.call("facts")["pid"]
        process.call("double", interrupt, number=2)
    assert gone(pid) and "closed" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_it_ends_with_its_parent(worker: str, tmp_path: Path, fork: bool, end: signal.Signals) -> None:
    program = (
        "import sys; from pathlib import Path; from lora2serve.system.worker_process import WorkerProcess;"
        "process = WorkerProcess('w', sys.argv[1], {}, Path(sys.argv[2], 'log'), fork=sys.argv[3]);"
        "process.__enter__().call('sleep', started=sys.argv[2] + '/started')"
    )
    server = fork_client.client()
    assert server is not None
    environment = {**os.environ, fork_client.VARIABLE: server.path}
    words = [sys.executable, "-c", program, worker, str(tmp_path), "if running" if fork else "never"]
    parent = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
    started = tmp_path / "started"
    for _ in range(12000):
        if started.exists() and started.read_text():
            break
        assert parent.poll() is None
        time.sleep(0.01)
    pid = int(started.read_text())
    os.kill(pid, 0)
    parent.send_signal(end)
    parent.wait(timeout=30)
    assert gone(pid)


def test_another_python(worker: str, tmp_path: Path) -> None:
    """One that has no lora2serve, nor anything else: what the protocol needs is the standard library."""
    bare = (shutil.which("python3", path=os.defpath) or sys._base_executable, "-I", "-S")  # type: ignore[attr-defined]
    options = {"python": bare}
    with WorkerProcess("bare", worker, {}, tmp_path / "log", 60, **options) as process:  # type: ignore[arg-type]
        assert process.call("double", number=2) == 4
        assert not any("site-packages" in path for path in process.call("facts")["path"])
    assert worker_process.PYTHON[0] == sys.executable
    assert "lora2serve" not in Path(worker_protocol.__file__).read_text().split('"""', 2)[2], (
        "it imports nothing of ours"
    )


def test_what_is_not_forked(worker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries read some variables when they are loaded: with others there, a worker loads them itself."""
    start(worker, tmp_path, fork=True).close()
    for name, value in (("HF_HOME", str(tmp_path)), ("OMP_NUM_THREADS", "3"), (fork_client.VARIABLE, fork_client.OFF)):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with WorkerProcess("some worker", worker, {}, tmp_path / "log", 60) as process:
                assert isinstance(process._process, subprocess.Popen), name
                assert process.call("double", number=2) == 4
    launched = {"RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "9"}
    for name, value in {"OLLAMA_HOST": "127.0.0.1:9", "XDG_CACHE_HOME": str(tmp_path), **launched}.items():
        monkeypatch.setenv(name, value)  # the control: a launcher's, say, which are read when they are used
        start(worker, tmp_path, fork=True).close()


def test_a_server_that_dies(worker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next worker starts by itself, the one after it from another server."""
    monkeypatch.setattr(fork_client, "_clients", [])
    with start(worker, tmp_path, fork=True) as process:
        assert process.call("double", number=2) == 4
        fork_client._clients[0]._server.kill()
        assert process.call("double", number=2) == 4, "it needs its server no more"
    assert (tmp_path / "log").read_text().splitlines() == ["closed"], "it is not killed before it has tidied up"
    with WorkerProcess("some worker", worker, {}, tmp_path / "log", 60) as process:
        assert isinstance(process._process, subprocess.Popen)
        assert process.call("double", number=2) == 4
    start(worker, tmp_path, fork=True).close()


@pytest.mark.parametrize("waits", [True, False])
def test_what_nobody_waits_for_is_not_forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    """A client that gave up starts its worker by itself, at the same link: two would share the messages."""
    monkeypatch.setattr(fork_client, "PATIENCE", 0.3 if not waits else 60.0)
    client = fork_client.ForkClient()
    if not waits:
        client._server.send_signal(signal.SIGSTOP)  # a machine so busy that loading takes minutes
    with open(os.devnull, "r+b") as nothing:
        forked = client.start("os.mkdir", [str(tmp_path / "made")], [nothing.fileno()] * 3, dict(os.environ))
    assert (forked is not None) == waits
    if forked:
        assert forked.wait(60) == 0
    else:
        client._server.send_signal(signal.SIGCONT)
        client._server.wait(60)
        time.sleep(0.5)
    assert (tmp_path / "made").exists() == waits


def test_threads_get_workers_of_their_own(worker: str, tmp_path: Path) -> None:
    """One request at a time: an answer that another thread takes would be another thread's worker."""
    problems: list[str] = []

    def ask(number: int) -> None:
        for _ in range(8):
            process = WorkerProcess(f"worker {number}", worker, {}, tmp_path / f"log{number}", 60, fork="always")
            with process:
                pid = process.call("facts")["pid"]
                if pid != process._process.pid:
                    problems.append(f"thread {number} holds {process._process.pid}, its worker is {pid}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_no_room_for_a_server(worker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_client, "_clients", [])
    monkeypatch.setattr(scratch, "_own", [])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with WorkerProcess("some worker", worker, {}, tmp_path / "log", 60, fork="always") as process:
        assert isinstance(process._process, subprocess.Popen)
        assert process.call("double", number=2) == 4


def test_a_server_that_cannot_fork(tmp_path: Path) -> None:
    """With a second thread, which a fork would lose in the middle of what it is at."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from lora2serve.system import fork_server;"
        "fork_server.LIBRARIES = ('decimal',); assert fork_server.load() == '', 'the control';"
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start();"
        "assert fork_server.load() == '2 threads are running'"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)


@pytest.mark.parametrize("library", ["pyarrow", pytest.param("pandas", marks=pytest.mark.engine)])
def test_a_library_that_brings_threads_along(library: str) -> None:
    """Arrow has one of its own as soon as it is loaded, by pandas say, which scikit-learn loads and transformers that."""
    program = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from lora2serve.system import fork_server;"
        f"fork_server.LIBRARIES = ('numpy', {library!r}); before = dict(os.environ);"
        "assert fork_server.load() == '' and 'pyarrow' in sys.modules and os.environ == before"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)


def test_where_the_hub_keeps_its_files() -> None:
    """Below XDG_CACHE_HOME, unless HF_HOME says so."""
    for hub, alike in ({"HF_HOME": "/x"}, True), ({}, False):
        assert (state({**hub, "XDG_CACHE_HOME": "/a"}) == state({**hub, "XDG_CACHE_HOME": "/b"})) == alike


@pytest.mark.engine
def test_what_libraries_set_for_themselves() -> None:
    """A process that has loaded them asks for its next worker with another environment, which must not be one."""
    program = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from lora2serve.system.fork_server import state;"
        "before, names = state(os.environ), set(os.environ);"
        "import cv2, lm_eval, sklearn, vllm.lora.lora_model; from transformers import Trainer;"
        "assert set(os.environ) > names, 'the control'; after = state(os.environ);"
        "assert after == before, [pair for pair in after[0] if pair not in before[0]];"
        "os.environ['LD_LIBRARY_PATH'] = '/tmp:' + os.environ['LD_LIBRARY_PATH'];"
        "assert state(os.environ) != before, 'the control'"
    )
    alone = {"PATH": os.environ["PATH"]}  # these tests may have loaded them
    subprocess.run([sys.executable, "-P", "-c", program], env=alone, check=True)


@pytest.mark.engine
def test_the_libraries_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch in a fork computes what it computes here, on as many threads, and draws other random numbers each time."""
    import torch

    monkeypatch.setattr(fork_client, "_clients", [])
    monkeypatch.setattr(fork_client, "SCRIPT", Path(fork_client.__file__).with_name("fork_server.py"))
    path = tmp_path / "torch_worker.py"
    path.write_text(
        "import sys\nhad = 'torch' in sys.modules and 'peft' in sys.modules\n"
        "import random, numpy, torch\n"
        "class Worker:\n    def __init__(self, link): pass\n    def facts(self):\n"
        "        values = torch.linspace(0, 1, 400 * 400).reshape(400, 400)\n"
        "        return {'had': had, 'sum': float((values @ values).double().sum()), 'threads': torch.get_num_threads(),"
        " 'cuda': torch.cuda.is_initialized(), 'drawn': [random.random(), float(numpy.random.rand())]}\n"
    )
    answers = []
    for _ in range(2):
        with start(f"{path}:Worker", tmp_path, fork=True, limit=300) as process:
            answers.append(process.call("facts"))
    values = torch.linspace(0, 1, 400 * 400).reshape(400, 400)
    for answer in answers:
        assert answer["had"] and not answer["cuda"] and answer["threads"] == torch.get_num_threads()
        assert answer["sum"] == pytest.approx(float((values @ values).double().sum()), rel=1e-6)
    assert not {*answers[0]["drawn"]} & {*answers[1]["drawn"]}
