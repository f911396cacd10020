"""One training by several processes: those that a launcher has started, or that are started here for each GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora2serve.artifacts import run as runs
from lora2serve.console import Terminal
from lora2serve.errors import UsageError
from lora2serve.progress import Progress
from lora2serve.system import scratch
from lora2serve.system.hardware import usable_gpus
from lora2serve.system.launcher import Launch
from lora2serve.system.local_launch import run_on_gpus
from lora2serve.training import ranks

ALL = "all"


@dataclass(frozen=True)
class RunFolder:
    """The run that all processes train, and where this one writes: the first one there, the others into a copy."""

    shared: runs.Run
    own: runs.Run


def on_gpus(
    gpus: int | str, recipe: str | Path | None, overrides: Sequence[str], name: str | None, resume: bool,
    gpu: str | None, progress: Progress,
) -> runs.Run:  # fmt: skip
    """Train by a process for each of so many GPUs of this machine."""
    names = _chosen(gpus)
    words = ["train", *([str(recipe)] if recipe else []), *(["--resume"] if resume else [])]
    words += [word for setting in overrides for word in ("--set", setting)]
    words += ["--name", name] if name else []
    words += ["--gpu", gpu] if gpu else []
    quiet = not isinstance(progress, Terminal) or progress.quiet
    printed = run_on_gpus(["--quiet", *words] if quiet else words, names)
    return runs.Run(Path(printed.strip().splitlines()[-1]))


def _chosen(gpus: int | str) -> tuple[str, ...]:
    names = usable_gpus()
    text = str(gpus)
    count = len(names) if text == ALL else int(text) if text.isdecimal() else 0
    if not count and text != ALL:
        raise UsageError(f"--gpus {gpus}: expected all, or a number of this machine's GPUs")
    if not names:
        raise UsageError(
            f"--gpus {gpus}: no NVIDIA GPU is here",
            "on CPUs a launcher starts several processes: `torchrun --nproc-per-node 2 -m lora2serve train`",
        )
    if count > len(names):
        raise UsageError(f"--gpus {gpus}: expected all, or a number from 1 to {len(names)}, the GPUs that are here")
    return names[:count]


@contextmanager
def as_one_of(launched: Launch, progress: Progress) -> Iterator[Progress]:
    """This process among those of a launcher; where its own words go."""
    from lora2serve.training.process_group import together

    if launched.rank == 0 and launched.processes > 1:
        progress.note(f"{launched.processes} processes train together")
    with together(launched):
        yield progress if launched.rank == 0 else ranks.OtherRank(progress)


def same_run(choose: Callable[[], runs.Run]) -> runs.Run:
    """The run that the first process chooses."""
    return runs.Run(Path(ranks.of_first(str(choose().path) if ranks.rank() == 0 else "")))


@contextmanager
def run_folder(name: str, resumed: runs.Run | None, progress: Progress) -> Iterator[RunFolder]:
    """A new run, or the one to go on with; `latest` points at it in the end, when it is whole for all of them."""
    if ranks.rank():
        shared = runs.Run(Path(ranks.of_first("")))
        with scratch.temporary_folder("rank") as folder:
            yield RunFolder(shared, ranks.own_copy(shared.path.absolute(), Path(folder)))
        ranks.barrier()
        return
    with scratch.filled(runs.ROOT):
        run = resumed or runs.create(name)
        if not resumed and (earlier := runs.unfinished_before(run, name)):
            way = f"`lora2serve train --resume {earlier.path}` continues it"
            progress.note(f"{run.path}: a new run beside {earlier.path}, which is not finished: {way}")
        with runs.kept_once_started(run), _hint_to_resume(run, progress):
            ranks.of_first(str(run.path))
            yield RunFolder(run, run)
    ranks.barrier()


@contextmanager
def _hint_to_resume(run: runs.Run, progress: Progress) -> Iterator[None]:
    """After Ctrl-C, at whatever stage: how to continue, where there is a checkpoint."""
    try:
        yield
    except KeyboardInterrupt:
        if run.has_checkpoint:
            progress.note(f"{run.path} is kept: `lora2serve train --resume` continues from its last checkpoint")
        raise
