"""The processes that train one run together: which this is, what they sum up, and who writes and speaks.

Each has the model, or a part of it, and a share of the rows of a step. Without a process group this one is all of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.artifacts.run import RECORD, Run
from lora2serve.errors import TrainError
from lora2serve.progress import Progress, Silent
from lora2serve.system.launcher import Launch

if TYPE_CHECKING:
    from torch import Tensor

BUCKET = 1 << 26  # values that are sent at once: 256 MB
joined: list[Launch] = []  # what the launcher says of this process, while it is one of several


def rank() -> int:
    """0 is the one that writes and speaks."""
    return joined[0].rank if joined else 0


def processes() -> int:
    """How many there are."""
    return joined[0].processes if joined else 1


def local_processes() -> int:
    """How many there are on this machine."""
    return joined[0].local_processes if joined else 1


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, on the CPU, where it costs no other device a thing."""
    total = values.cpu()
    if joined:
        from torch import distributed

        distributed.all_reduce(total)
    return total


def barrier() -> None:
    """Wait until all are here."""
    all_agree(True)


def all_agree(yes: bool) -> bool:
    """Whether each of them says yes."""
    if not joined:
        return yes
    import torch

    return int(summed(torch.tensor([0 if yes else 1]))) == 0


def of_first(text: str) -> str:
    """The first process's text, in all of them."""
    if not joined:
        return text
    import torch
    from torch import distributed

    texts: list[object] = [text]
    distributed.broadcast_object_list(texts, 0, device=torch.device("cpu"))
    return str(texts[0])


@contextmanager
def first_on_machine() -> Iterator[None]:
    """One process of each machine does it; the others come after it, and find in the cache what it has fetched."""
    later = bool(joined and joined[0].local_rank)
    if later:
        barrier()
    yield
    if not later:
        barrier()


def same_parameters(parameters: Sequence[Tensor]) -> None:
    """Let all begin with those of the first, in place."""
    from torch import distributed

    for parameter in parameters:
        distributed.broadcast(parameter.data, 0)


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Each gradient becomes its sum over all processes; one that nobody has stays None."""
    import torch
    from torch import distributed

    there = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
    used = [parameter for parameter, count in zip(parameters, summed(there).tolist(), strict=True) if count]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets(used):
        gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distributed.all_reduce(flat)
        parts = torch.split(flat, [each.numel() for each in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for parameter in parameters:
        if bucket and sum(each.numel() for each in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def own_copy(run: Path, folder: Path) -> Run:
    """Where another process than the first keeps its copy of the run at ``run``; the checkpoints are those of all.

    TrainError where the run is not on this machine.
    """
    if not run.is_dir():
        raise TrainError(f"{run}: not on this machine, and all processes of a training need it",
                         "start it in a folder that all machines share")  # fmt: skip
    copy = Run(folder / run.name)
    copy.path.mkdir()
    (run / "checkpoints").mkdir(exist_ok=True)
    (copy.path / "checkpoints").symlink_to(run / "checkpoints")
    if (run / RECORD).is_file():
        shutil.copyfile(run / RECORD, copy.path / RECORD)
    return copy


class OtherRank(Silent):
    """The ``Progress`` of another process than the first, which says all that is the same in each of them."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def warn_alone(self, text: str) -> None:
        """What happened in this process only."""
        self._progress.warn(f"process {rank()}: {text}")


def warn_alone(progress: Progress, text: str) -> None:
    """Of something that each process meets for itself."""
    if isinstance(progress, OtherRank):
        progress.warn_alone(text)
    else:
        progress.warn(text)
