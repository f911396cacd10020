"""A process joins those that train with it. However one of them ends, the others end too, and one says why."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Thread

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lora2serve.errors import EndedTogether, Lora2ServeError, TrainError, UsageError, first_line
from lora2serve.system import launcher
from lora2serve.system.hardware import VISIBLE, usable_gpus
from lora2serve.system.launcher import Launch
from lora2serve.training.ranks import joined

WAIT = timedelta(days=1)  # while one fetches a base; whoever is gone is noticed at once, or by the launcher
MEET = timedelta(minutes=10)  # for all to come
READ = 3.0  # seconds for the others to read who ended first
LOOK = 0.05  # seconds between two looks whether they have
FIRST, HAS_READ = "lora2serve/first", "lora2serve/read"
LOST = ("closed by peer", "reset by peer", "gloo/transport", "NCCL error", "ncclRemoteError")


@contextmanager
def together(launch: Launch) -> Iterator[None]:
    """One of the processes that a launcher has started, with one GPU of its own where there are any.

    EndedTogether where another one ended first; TrainError where that one could not say why.
    """
    _take_gpu(launch)
    if launch.processes == 1:
        with launcher.hidden():
            yield
        return
    store = _store()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with launcher.hidden():
        try:
            distributed.init_process_group(
                backend, store=PrefixStore("lora2serve/group", store),
                rank=launch.rank, world_size=launch.processes, timeout=WAIT,
            )  # fmt: skip
            joined[:] = [launch]
            yield
        except BaseException as error:
            _end(error, store, launch)
            raise
        finally:
            _leave()


def _store() -> Store:
    """Where the processes find each other."""
    try:
        store = _meet()
    except (RuntimeError, ValueError) as error:
        address = ":".join(os.environ[name] for name in launcher.ADDRESS)
        message = f"{address}: the processes of this training do not meet there ({first_line(error)})"
        raise TrainError(message, "start all of them, with one MASTER_ADDR and MASTER_PORT; torchrun does") from error
    return store


def _meet() -> Store:
    """Waits in another thread: torch looks at no signal before all are there, and Ctrl-C would do nothing till then."""
    met: Future[Store] = Future()

    def wait() -> None:
        try:
            met.set_result(next(rendezvous("env://", timeout=MEET))[0])
        except Exception as error:
            met.set_exception(error)

    Thread(target=wait, daemon=True).start()  # a pool's thread would be waited for when this process is to end
    return met.result()


def _take_gpu(launch: Launch) -> None:
    """Before torch looks for one. A launcher may have given each process its own already."""
    gpus = usable_gpus()
    if len(gpus) <= 1:
        return
    if launch.local_rank >= len(gpus):
        raise UsageError(
            f"LOCAL_RANK={launch.local_rank}: this machine has {len(gpus)} GPUs, and each process needs one",
            f"start {len(gpus)} processes a machine",
        )
    os.environ[VISIBLE] = gpus[launch.local_rank]


def _leave() -> None:
    joined.clear()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _end(error: BaseException, store: Store, launch: Launch) -> None:
    """Let the others end; raise what this process has to say, unless it is ``error`` itself."""
    code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    mine = f"{launch.rank}:{code}"
    try:
        first = store.compare_set(FIRST, "", mine).decode()
    except RuntimeError:  # it was in the first process, and has gone with that one
        first = mine if launch.rank == 1 else "0:1"
    if first != mine:
        with suppress(RuntimeError):
            store.set(f"{HAS_READ}/{launch.rank}", "")
        raise EndedTogether(int(first.split(":")[1])) from error
    _leave()
    others = [f"{HAS_READ}/{other}" for other in range(launch.processes) if other != launch.rank]
    deadline = time.monotonic() + READ
    with suppress(RuntimeError):
        while not store.check(others) and time.monotonic() < deadline:
            time.sleep(LOOK)
    if _is_loss(error):
        raise TrainError(
            "another process of this training has ended without a word",
            "`lora2serve train --resume` in as many processes continues from the last checkpoint, where there is one",
        ) from error


def _is_loss(error: BaseException) -> bool:
    """Whether an error says that another process does not answer."""
    if isinstance(error, Lora2ServeError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, distributed.DistError) or any(words in str(error) for words in LOST)
