"""Whether a launcher has started this process as one of several: torchrun, accelerate, Kubernetes' trainers, Ray.

What torch.distributed reads is what they all set: RANK and WORLD_SIZE, and where the first of the processes listens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from lora2serve.errors import UsageError

ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
LAST_PORT = 65535
# by which libraries would make a second group of the same processes
HIDDEN = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE",
)  # fmt: skip
OTHERS_SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


@dataclass(frozen=True)
class Launch:
    """Which of how many processes this is, in all and on this machine."""

    rank: int
    processes: int
    local_rank: int
    local_processes: int


def launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """What a launcher says of this process; None where none has started it. UsageError with all that cannot be."""
    if "RANK" not in environment and environment.get("WORLD_SIZE", "1") == "1":
        return None
    problems: list[str] = []

    def number(name: str, default: int | None = None) -> int:
        text = environment.get(name, "" if default is None else str(default))
        if not text.isdecimal():
            what = f"{name}={text}:" if name in environment else f"{name}: not set,"
            problems.append(f"{what} expected a number, as a launcher sets it")
        return int(text) if text.isdecimal() else 0

    rank, processes = number("RANK"), number("WORLD_SIZE")
    launched = Launch(rank, processes, number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", 1))
    if not problems and rank >= processes:
        problems.append(f"RANK={rank}: expected less than WORLD_SIZE={processes}")
    if processes > 1:
        problems += [
            f"{name}: not set, and {processes} processes need it" for name in ADDRESS if name not in environment
        ]
        port = environment.get("MASTER_PORT", "1")
        if not (port.isdecimal() and 0 < int(port) <= LAST_PORT):
            problems.append(f"MASTER_PORT={port}: expected a port from 1 to {LAST_PORT}")
    problems += [
        f"{name}: not supported; train.parallel: fsdp cuts the base into parts"
        for name in OTHERS_SHARDING
        if environment.get(name, "").lower() in ("1", "true")
    ]
    if problems:
        raise UsageError("\n".join(problems), "start it by `torchrun --nproc-per-node N -m lora2serve train ...`")
    return launched


def is_first() -> bool:
    """Whether this process speaks for all that were started together."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def hidden() -> Iterator[None]:
    """Libraries and child processes take this for a process by itself, as long as it lasts."""
    before = {name: os.environ.pop(name) for name in HIDDEN if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
