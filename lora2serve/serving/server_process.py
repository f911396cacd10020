"""A server as a child process: started, waited for until it answers, and ended with this one."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from types import FrameType

from lora2serve.errors import EngineError
from lora2serve.progress import Progress
from lora2serve.serving.server import ServerCommand
from lora2serve.system import interruption, scratch
from lora2serve.system.http import HttpClient, HttpError, HttpStatus

READY = 900.0  # seconds until an engine must answer
PAUSES = (0.05, 0.1, 0.2)  # seconds between the first questions whether it does; then the longest
LONGEST_PAUSE = 0.5
PATIENCE = 15.0  # seconds that it has to end once it is asked to
LOG_PREFIX = re.compile(r"^(\(\w+( pid=\d+)?\) )?((ERROR|WARNING|INFO) [\d-]+ [\d:]+ \[[\w.:]+\] )?")  # of vLLM's log
EXCEPTION = re.compile(r"(\w+\.)*\w*(Error|Exception): ")
_MEMORY = (
    "shorten it with -- --max-model-len N, or give it more: VLLM_CPU_KVCACHE_SPACE=GiB on a CPU, "
    "-- --gpu-memory-utilization 0.95 on a GPU; "
)
WAYS_OUT = {  # what vLLM says -> what helps
    "KV cache": _MEMORY,
    "cache blocks": _MEMORY,
    "out of memory": _MEMORY,
    "Free memory on device": "another process has the GPU: end it, or -- --gpu-memory-utilization 0.5; ",
}


def run(server: ServerCommand, progress: Progress) -> int:
    """Start it, note when it answers, and stay until it ends; its exit code. Signals are passed on."""
    _refuse_taken(server.host, server.port)
    log = scratch.log_file("serve")
    signals: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if process is not None:
            _end_group(process.pid)

    handlers = interruption.handle(stop)
    try:
        process = _spawned(server, log, start_new_session=True)
        if signals:  # before there was anything to end
            _end_group(process.pid)
        progress.note(f"starting {server.engine}; its log: {log}")
        _wait(server, process, log)
        progress.note(f"{server.address} serves {server.served}")
        progress.note(server.curl)
        code = process.wait()
        if code and not signals:
            progress.warn(f"{server.engine} ended with code {code}; its log: {scratch.keep(log)}")
    except EngineError:
        if not signals:
            raise
        code = 0  # ended while it started, as it was asked to
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if process is not None and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return 0 if signals else code


def _end_group(group: int) -> None:
    """Ask its processes to end, and end those that do not: vLLM waits for good for a part of it that is gone."""

    def send(number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(group, number)

    send(signal.SIGTERM)
    kill = threading.Timer(PATIENCE, send, [signal.SIGKILL])
    kill.daemon = True
    kill.start()


def start(server: ServerCommand, log: Path) -> subprocess.Popen[bytes]:
    """Start it in this process's own group and return once it answers; EngineError with what its log says."""
    process = _spawned(server, log)
    try:
        _wait(server, process, log)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process


def _spawned(server: ServerCommand, log: Path, *, start_new_session: bool = False) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **server.environment, **scratch.environment()}
    with log.open("wb") as out:
        return subprocess.Popen(
            server.command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=start_new_session, cwd=server.folder or scratch.empty_folder(),
        )  # fmt: skip


def _wait(server: ServerCommand, process: subprocess.Popen[bytes], log: Path) -> None:
    path = "/health" if server.engine == "vllm" else "/v1/models"
    client, end, pauses = HttpClient(server.address, patience=5), time.monotonic() + READY, iter(PAUSES)
    while time.monotonic() < end:
        if process.poll() is not None:
            reason = first_error(log.read_text(encoding="utf-8", errors="replace"))
            hint = next((hint for sign, hint in WAYS_OUT.items() if sign in reason), "")
            raise EngineError(
                f"{server.engine} ended with code {process.returncode}: {reason}", f"{hint}its log: {scratch.keep(log)}"
            )
        try:
            client.send("GET", path)
            return
        except HttpError as error:
            if isinstance(error, HttpStatus) and error.status == HTTPStatus.UNAUTHORIZED:
                return  # it wants its key, and answers
            time.sleep(next(pauses, LONGEST_PAUSE))
    raise EngineError(f"{server.engine} did not answer within {READY:g} s", f"its log: {scratch.keep(log)}")


def first_error(text: str) -> str:
    """The first exception in a long log, without what its process puts before each line."""
    lines = [LOG_PREFIX.sub("", line.strip()) for line in text.splitlines() if line.strip()]
    raised = [line for line in lines if EXCEPTION.match(line)]
    errors = [line for line in lines if "Error" in line and "Traceback" not in line]
    return (raised or errors or lines[-1:] or ["nothing in its log"])[0][:400]


def _refuse_taken(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EngineError(f"port {port} on {host}: {error.strerror}", "choose another with --port") from None
