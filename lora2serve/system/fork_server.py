"""A process that has the heavy libraries loaded and forks itself on request: a worker need not load them again.

Started by fork_client.py as a script: ``fork_server.py FD PATH``. It ends when its starter closes FD; at the socket
PATH others may ask too. It runs no operation of torch, has one thread and touches no GPU, or it refuses to fork.
"""

from __future__ import annotations

import gc
import os
import pkgutil
import random
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from lora2serve.system.worker_protocol import Link, LinkClosed

LIBRARIES = ("numpy", "torch", "safetensors.torch", "transformers.modeling_utils", "transformers.models.auto", "peft")
DESCRIPTORS = 5  # stdin, stdout, stderr, the exit code's socket, a link: as many come with a request at most
WITHOUT_THREADS = {  # for those that start some as they are loaded: numpy's and scipy's BLAS, and Arrow (by pandas)
    "OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false",
}  # fmt: skip
LINK = "{link}"  # in a request's arguments: the number of the link's descriptor
# what no library reads while it is loaded
HARMLESS = ("PWD", "OLDPWD", "_", "SHLVL", "COLUMNS", "LINES", "PYTEST_", "PYTHONUNBUFFERED", "PYTHONSAFEPATH",
            "LORA2SERVE_", "OLLAMA_", "OPENAI_", "VLLM_", "LLAMA_CPP_DIR", "GITHUB_", "XDG_CONFIG_HOME",
            "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_", "GLOO_")  # fmt: skip
# what libraries set for themselves as they are loaded, also in the middle of a process that asks for its second worker:
# scikit-learn, by transformers, the first two; torch's inductor and vLLM those up to AITER, then lm-eval, Ray, and the
# BOFT of PEFT
SET_BY_LIBRARIES = (
    "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS",
    "PYTORCH_NVML_BASED_CUDA_CHECK", "TRITON_CACHE_AUTOTUNING", "TILELANG_CLEANUP_TEMP_FILES",
    "AITER_", "HF_XET_HIGH_PERFORMANCE", "RAY_CLIENT_MODE", "CC", "CXX",
)  # fmt: skip
LIBRARY_PATH = "LD_LIBRARY_PATH"
CACHE, HUB = "XDG_CACHE_HOME", "HF_HOME"  # the one is read for the other's default alone


def load() -> str:
    """Import the libraries; why this process must not fork, or nothing."""
    before = dict(os.environ)
    os.environ.update(WITHOUT_THREADS)
    gc.disable()  # it would look again and again at what the libraries bring: a quarter of the time
    for library in LIBRARIES:
        with suppress(Exception):  # not installed, or broken: the worker that needs it says so
            import_module(library)
    gc.enable()
    for name in WITHOUT_THREADS:
        os.environ.pop(name)
        if name in before:
            os.environ[name] = before[name]
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        return f"{threads} threads are running"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "the GPU is in use"
    return ""


def state(environment: Mapping[str, str]) -> list[object]:
    """What a child inherits and libraries read while they load: a request's must be the server's own."""
    umask = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Umask"))
    variables = {key: value for key, value in environment.items() if not key.startswith((*HARMLESS, *SET_BY_LIBRARIES))}
    if HUB in variables:
        variables.pop(CACHE, None)
    paths = variables.get(LIBRARY_PATH, "").split(":")
    variables[LIBRARY_PATH] = ":".join(path for path in paths if path and "/cv2/" not in path)  # OpenCV adds its own
    return [sorted(map(list, variables.items())), sorted(os.sched_getaffinity(0)), umask, sys.executable]


class ForkServer:
    """Answers requests from every connection, and tells each child's exit code to whoever asked for it."""

    def __init__(self, owner: socket.socket, path: str) -> None:
        self._state = state(os.environ)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._path = Path(path)
        self._owner = owner.fileno()
        self._clients = {owner.fileno(): owner}
        self._children: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> pid, where its exit code goes
        self._refusal = load()
        gc.collect()
        gc.freeze()  # in every child, too: a collection would look through all that is loaded, and copy its pages

    def run(self) -> tuple[dict[str, Any], list[int]]:
        """Serve until the owner is gone; returns, in a child only, the request and its descriptors."""
        while True:
            poll = select.poll()
            for descriptor in (self._listener.fileno(), *self._clients, *self._children):
                poll.register(descriptor, select.POLLIN)
            for descriptor, _ in poll.poll():
                if descriptor == self._listener.fileno():
                    client, _ = self._listener.accept()
                    self._clients[client.fileno()] = client
                elif descriptor in self._children:
                    self._reap(descriptor)
                elif (child := self._answer(descriptor)) is not None:
                    return child

    def _reap(self, descriptor: int) -> None:
        pid, status = self._children.pop(descriptor)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(descriptor)
        with suppress(LinkClosed):
            Link(status).send({"code": code})
        status.close()

    def _answer(self, descriptor: int) -> tuple[dict[str, Any], list[int]] | None:
        """Fork for one request of a client; in the child its request and descriptors, in the server None."""
        link = Link(self._clients[descriptor])
        received: list[int] = []
        try:
            _, received, _, _ = socket.recv_fds(link.socket, 1, DESCRIPTORS)
            request = link.receive()
        except (LinkClosed, OSError):
            if descriptor == self._owner:
                self._end()
            self._clients.pop(descriptor).close()
            for number in received:  # it ended in the middle: whoever reads its output waits for the last of these
                os.close(number)
            return None
        if _is_gone(link.socket):  # it waits no longer, and has begun what it asked for by itself
            for number in received:
                os.close(number)
            return None  # the next message of it is its end
        refusal = self._refusal or ("" if request["state"] == self._state else "another environment")
        pid = 0 if refusal else os.fork()
        if not pid and not refusal:
            self._forget()
            return request, received
        if pid:
            status = socket.socket(fileno=os.dup(received[3]))
            self._children[os.pidfd_open(pid)] = pid, status
        for number in received:
            os.close(number)
        with suppress(LinkClosed):
            link.send({"pid": pid, "refusal": refusal})
        return None

    def _end(self) -> None:
        with suppress(OSError):  # the owner has removed them
            self._path.unlink()
            self._path.parent.rmdir()
        os._exit(0)

    def _forget(self) -> None:
        """Close what is the server's alone."""
        self._listener.close()
        for client in self._clients.values():
            client.close()
        for descriptor, (_, status) in self._children.items():
            os.close(descriptor)
            status.close()


def _is_gone(connection: socket.socket) -> bool:
    """Whether the other end is closed, whatever there is still to read."""
    hangup = select.poll()
    hangup.register(connection, select.POLLRDHUP)
    return bool(hangup.poll(0))


def become(request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """Turn this fork into the process that was asked for, and run it."""
    os.setsid()
    for target, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, target)
    for descriptor in descriptors[:4]:
        os.close(descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    sys.argv = list(request["argv"])
    sys.path[0] = request["path"]
    link = descriptors[4] if len(descriptors) == DESCRIPTORS else None
    arguments = [link if value == LINK else value for value in request["arguments"]]
    pkgutil.resolve_name(request["function"])(*arguments)


def main() -> None:
    """``fork_server.py FD PATH``."""
    become(*ForkServer(socket.socket(fileno=int(sys.argv[1])), sys.argv[2]).run())


if __name__ == "__main__":
    main()
