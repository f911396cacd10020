"""pytest-xdist's workers, forked from one process that has the libraries loaded.

As a script it stands for the interpreter that xdist starts a worker with: ``python forked_worker.py SOCKET -u -c CODE``.
Each worker would load torch, transformers and peft by itself, and so would the fork server of each; here one server
does for all of them, and for the commands and workers of their tests as well.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from lora2serve.system import fork_client

ROOT = Path(__file__).parents[2]
POPEN = "popen"


def specs(workers: Sequence[str]) -> tuple[str, ...]:
    """xdist's ``--tx`` with forked workers; as they are where nothing can be forked. The server runs until we end."""
    server = fork_client.client() if POPEN in workers else None
    if server is None or server.start("os:_exit", [0], [0, 1, 2], dict(os.environ)) is None:
        return tuple(workers)
    os.environ[fork_client.VARIABLE] = server.path  # what tests start comes from it, too
    python = shlex.join([sys.executable, __file__, server.path])
    return tuple(f"popen//python={python}" if worker == POPEN else worker for worker in workers)


def run(code: str) -> None:
    """What ``python -c`` does, in the fork; without the five seconds in which the libraries take themselves apart."""
    from lora2serve.cli.leave import leave  # not where main() waits

    sys.path.insert(0, "")
    exec(code, {"__name__": "__main__"})
    leave(0)


def main(path: str, *words: str) -> int:
    """Stand for the worker until it ends."""
    code = words[-1]
    worker = fork_client.ForkClient(path).start(
        "tests.support.forked_worker:run",
        [code],
        [0, 1, 2],
        dict(os.environ),
        argv=["-c"],
        folder=Path.cwd(),
        path=ROOT,
    )
    if worker is None:  # it refuses: another environment, a thread
        os.execv(sys.executable, [sys.executable, *words])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(worker.pid, number))
    return abs(worker.wait())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
