"""``lora2serve gateway`` as a process: signals, a disk that is full, and what it refuses to start with."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lora2serve import Registry
from lora2serve.cli import run
from tests.support.gateways import Answer, call, chat, metrics, total, wait_for
from tests.support.ports import free_port
from tests.support.stub_upstream import StubUpstream, running_stub

pytestmark = pytest.mark.engine
SMALL_BLOCKS = 300  # of 512 bytes: the largest file that the process may write


@contextmanager
def gateway(
    folder: Path, stub: StubUpstream, seed: Path, *, small: bool = False
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    shutil.copytree(seed / "registry", folder / "registry")
    with Registry(folder / "registry") as registry:
        registry.promote("towns@1")
    port = free_port()
    (folder / "gateway.yaml").write_text("routes: {twons: {challenger: {share: 0.5}}}")
    words = ["gateway", "--upstream", f"prod={stub.url}", "--port", str(port)]
    command = [sys.executable, "-m", "lora2serve", *words]
    if small:
        command = ["sh", "-c", f'ulimit -f {SMALL_BLOCKS} && exec "$@"', "sh", *command]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, process.communicate()
        try:
            return call(url, "/gateway/health").status == 200
        except OSError:
            return False

    try:
        wait_for(answers, "it answers", 60)
        yield process, url
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_lets_streams_end(tmp_path: Path, seed: Path, number: signal.Signals) -> None:
    with running_stub() as stub, gateway(tmp_path, stub, seed) as (process, url):
        chat(url)
        stub.faults.gate = threading.Event()
        answers: list[Answer] = []
        thread = threading.Thread(target=lambda: answers.append(chat(url, "a b c", stream=True)))
        thread.start()
        wait_for(lambda: len(stub.asked()) == 2, "it is under way")
        process.send_signal(number)

        def refuses() -> bool:
            try:
                return call(url, "/gateway/health").status != 200
            except OSError:
                return True

        wait_for(refuses, "nobody new is let in")
        assert process.poll() is None
        stub.faults.gate.set()
        thread.join()
        assert answers[0].text == "towns-1 says a b c" and answers[0].body.endswith(b"[DONE]\n\n")
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "")
        assert "routes.twons: no such name in the registry (did you mean 'towns'?)" in err.splitlines()[0]
        assert err.splitlines()[1].endswith("answers for towns") and err.splitlines()[-1] == "ended"
        assert "Traceback" not in err


def test_a_disk_that_is_full(tmp_path: Path, seed: Path) -> None:
    """No file of the process may grow any more: answers come, records are counted as lost."""
    with running_stub() as stub, gateway(tmp_path, stub, seed, small=True) as (process, url):
        lost = 0.0
        for number in range(3000):
            got = chat(url, f"question {number}")
            assert got.status == 200 and got.text == f"towns-1 says question {number}"
            if number % 100 == 99:
                lost = total(metrics(url), "lora2serve_records_dropped_total", reason="disk")
            if lost:
                break
        assert lost > 0
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "requests go on, and are not recorded" in err


def test_what_it_does_not_start_with(tmp_path: Path, seed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(["gateway"]) == 2
    assert "upstreams: none, expected one or more" in capfd.readouterr().err
    assert run(["gateway", "--upstream", "prod=localhost"]) == 2
    assert "upstreams.prod.url: localhost: invalid address" in capfd.readouterr().err
    assert run(["gateway", "--upstream", "prod=http://localhost:1"]) == 2
    assert "no registry at" in capfd.readouterr().err
    shutil.copytree(seed / "registry", "registry")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert run(["gateway", "--upstream", "prod=http://localhost:1", "--port", port]) == 1
        assert f"port {port} on 127.0.0.1: Address already in use" in capfd.readouterr().err
    Path("gateway.yaml").write_text("upstreams: {prod: {urn: x}}")
    assert run(["gateway"]) == 2
    assert (
        "gateway.yaml: upstreams.prod.urn: unknown key (did you mean 'upstreams.prod.url'?)" in capfd.readouterr().err
    )
