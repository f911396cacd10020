"""One GPU for one trial, also where several sweeps and joined workers share a machine."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lora2serve.errors import EngineError
from lora2serve.system import file_lock

WAIT = 1.0  # seconds between two looks for a free one


@contextmanager
def leased_gpu(gpus: tuple[str, ...], given_up: Callable[[], bool] = lambda: False) -> Iterator[str | None]:
    """One of them for a while, once one is free; None where there are none. EngineError once nobody waits any more."""
    if not gpus:
        yield None
        return
    with ExitStack() as stack:
        while True:
            for gpu in gpus:
                with suppress(BlockingIOError):
                    stack.enter_context(file_lock.locked(lease_file(gpu)))
                    yield gpu
                    return
            if given_up():
                raise EngineError("stopped")
            time.sleep(WAIT)


def lease_file(gpu: str) -> Path:
    """Whoever holds its lock has the GPU; one name for all processes of a user on this machine."""
    return Path(tempfile.gettempdir()) / f"lora2serve-gpu-{os.getuid()}-{gpu.replace('/', '-')}.lock"
