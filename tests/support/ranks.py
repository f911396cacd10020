"""Processes that train one run together, as a launcher starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.commands import run_command


def launched(count: int) -> list[dict[str, str]]:
    """The environment of each of so many processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"LOCAL_WORLD_SIZE": str(count)}
    return [{**shared, "RANK": str(number), "LOCAL_RANK": str(number)} for number in range(count)]


def train_together(folder: Path, *words: str, count: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """``lora2serve train WORDS`` in so many processes at once, forked from one that has the libraries."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda ours: run_command(["train", *words], folder, ours), launched(count)))


def start_together(folder: Path, *words: str, count: int = 2) -> list[subprocess.Popen[str]]:
    """The same in processes of their own, to be sent signals."""
    return start_python(folder, ["-m", "lora2serve", "train", *words], count)


def start_python(folder: Path, words: Sequence[str], count: int = 2) -> list[subprocess.Popen[str]]:
    """``python WORDS`` in so many processes."""
    return [
        subprocess.Popen(
            [sys.executable, *words], cwd=folder, env={**os.environ, **ours},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for ours in launched(count)
    ]  # fmt: skip


def ends(children: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each, once it has ended."""
    texts = [child.communicate(timeout=300) for child in children]
    return [(child.returncode, *text) for child, text in zip(children, texts, strict=True)]
