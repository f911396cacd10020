"""The talk with llama.cpp's own converter, which runs in a process of its own: upstream_child.py.

Its ``gguf`` is newer than PyPI's and has the same name, and its classes are somebody else's code: neither is imported
here. What is said: one plan, then one tensor for another, as bytes over a socket pair.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import IO, TYPE_CHECKING, Any

from converters.gguf.upstream.upstream_child import receive, send
from lora2serve.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor

CHILD = Path(__file__).with_name("upstream_child.py")


class ConverterProcess:
    """``asked``: what the child is told of the model; ``read`` gives a whole tensor of it, in the type it was told."""

    def __init__(self, tree: Path, asked: Mapping[str, Any], read: Callable[[str], Tensor]) -> None:
        self._architecture, self._read, self._lock = asked["architecture"], read, Lock()
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by _end)
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", str(CHILD), str(tree), str(theirs.fileno())]
            kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._words, stderr=self._words, pass_fds=(theirs.fileno(),),
                env=kept | {"HF_HUB_OFFLINE": "1"}, start_new_session=True,
            )  # fmt: skip
        self._link = Connection(ours.detach())
        self.close = weakref.finalize(self, _end, self._process, self._link, self._words)
        self._tell(asked)

    def plan(self) -> dict[str, Any]:
        """See ``Child.plan``."""
        plan: dict[str, Any] = self._answer("plan")
        return plan

    def make(self, target: str, given: Mapping[str, Tensor]) -> Tensor:
        """The values of one planned tensor, float32; what it needs beside ``given`` is read."""
        with self._lock:
            self._tell((target, list(given)))
            for values in given.values():
                self._send(values)
            shape = self._answer("made")
            try:
                found: Tensor = receive(self._link, shape, "float32")
            except (EOFError, OSError):
                raise self._gone() from None
            return found

    def _answer(self, kind: str) -> Any:
        """The child's next word of that kind; what it asks for meanwhile is sent."""
        while True:
            try:
                said, content = self._link.recv()
            except (EOFError, OSError):
                raise self._gone() from None
            if said == "need":
                self._send(self._read(content))
            elif said == "error":
                raise self._refused(content)
            elif said == kind:
                return content

    def _tell(self, content: Any) -> None:
        try:
            self._link.send(content)
        except OSError:
            raise self._gone() from None

    def _send(self, values: Tensor) -> None:
        import torch

        try:
            send(self._link, values.contiguous().reshape(-1).view(torch.uint8).numpy())
        except OSError:
            raise self._gone() from None

    def _refused(self, why: str) -> ExportError:
        hint = "serve it with --target vllm"
        if "pre-tokenizer was not recognized" in why:
            hint = "name it with --pre (such as llama-bpe, qwen2, gpt-2): a wrong one is found out before it is used"
            why = "its table of pre-tokenizers has not this one"
        elif "preprocessor" in why or "image_mean" in why:
            hint = "copy the base's preprocessor_config.json beside it"
        return ExportError(f"architecture {self._architecture}: llama.cpp's converter refuses it: {why}", hint)

    def _gone(self) -> ExportError:
        self._process.wait(timeout=30)
        self._words.seek(0)
        lines = self._words.read().decode("utf-8", "replace").strip().splitlines() or ["no word"]
        return ExportError(
            f"llama.cpp's converter ended with code {self._process.returncode}: {lines[-1][:300]}",
            "is there enough memory? Its own program (convert_hf_to_gguf.py) may say more",
        )


def _end(process: subprocess.Popen[bytes], link: Connection, words: IO[bytes]) -> None:
    """The child ends when its link does; one that is in the middle of something is stopped."""
    link.close()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    words.close()
