"""The processes that a test starts, whoever is their parent."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest

from lora2serve.system import fork_client


def watch(patch: pytest.MonkeyPatch) -> Callable[[], list[psutil.Process]]:
    """Asks what runs of all that this process starts from now on: its children are those of the fork server, too."""
    pids, made = list[int](), fork_client.ForkedProcess.__init__

    def note(self: fork_client.ForkedProcess, pid: int, status: socket.socket) -> None:
        pids.append(pid)
        made(self, pid, status)

    patch.setattr(fork_client.ForkedProcess, "__init__", note)

    def running() -> list[psutil.Process]:
        found = psutil.Process().children(recursive=True)
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                found += [(forked := psutil.Process(pid)), *forked.children(recursive=True)]
        return list(dict.fromkeys(found))

    return running
