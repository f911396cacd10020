"""Starts the processes of one training on this machine, one for each GPU, and ends with them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from lora2serve.errors import EndedTogether, TrainError
from lora2serve.system import interruption, scratch
from lora2serve.system.hardware import VISIBLE

GRACE = 15.0  # seconds that the others have to end by themselves once one has failed
LOOK = 0.05  # seconds between two looks at them
LOCAL = "127.0.0.1"


def run_on_gpus(words: Sequence[str], gpus: Sequence[str]) -> str:
    """``lora2serve WORDS`` by a process for each of ``gpus``; what the first one has printed on stdout.

    EndedTogether where they failed or were interrupted, and one has said why; TrainError where none could.
    """
    with _started(words, gpus) as children, _signals_to(children):
        first = children[0]
        assert first.stdout is not None
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(first.stdout or ()), daemon=True)
        reader.start()
        codes = _wait(children)
        reader.join()
    if not any(codes):
        return "".join(lines)
    spoken = [code for code in codes if code > 0]
    if spoken:
        raise EndedTogether(max(spoken))  # 130 before 1: what the others met came of that
    number, code = next((number, code) for number, code in enumerate(codes) if code)
    raise TrainError(
        f"process {number} of the training was killed ({signal.Signals(-code).name})",
        "`lora2serve train --resume` with the same --gpus continues from the last checkpoint, where there is one",
    )


@contextmanager
def _started(words: Sequence[str], gpus: Sequence[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """One process a GPU; whatever happens, none is left."""
    children: list[subprocess.Popen[str]] = []
    shared = {"MASTER_ADDR": LOCAL, "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(len(gpus))}
    shared |= {"LOCAL_WORLD_SIZE": str(len(gpus)), "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
    try:
        for number, gpu in enumerate(gpus):
            own = {"RANK": str(number), "LOCAL_RANK": str(number), VISIBLE: gpu}
            children.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "lora2serve", *words], stdin=subprocess.DEVNULL, text=True,
                    stdout=subprocess.DEVNULL if number else subprocess.PIPE, start_new_session=True,
                    env={**os.environ, **scratch.environment(), **shared, **own},
                )
            )  # fmt: skip
        yield children
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()


@contextmanager
def _signals_to(children: Sequence[subprocess.Popen[str]]) -> Iterator[None]:
    """Ctrl-C and its like are theirs: they finish the step, save, and end."""

    def send(number: int, frame: FrameType | None) -> None:
        for child in children:
            with suppress(ProcessLookupError):
                child.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = interruption.handle(send)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: Sequence[subprocess.Popen[str]]) -> list[int]:
    """Their exit codes, once all have ended; after a failure the others are not waited for for long."""
    deadline = None
    for ending in (signal.SIGTERM, signal.SIGKILL):
        while any(child.poll() is None for child in children):
            if deadline is None and any(child.poll() for child in children):
                deadline = time.monotonic() + GRACE
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(LOOK)
        for child in children:
            if child.poll() is None:
                child.send_signal(ending)
        deadline = None if deadline is None else time.monotonic() + GRACE
    return [child.wait() for child in children]


def _free_port() -> int:
    with socket.create_server((LOCAL, 0)) as server:
        return int(server.getsockname()[1])
