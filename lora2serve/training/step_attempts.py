"""One optimizer step, done again in another way where memory or the compiler refuses the first."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora2serve.errors import TrainError
from lora2serve.training.batch_parts import LABEL, Batch, parts, units
from lora2serve.training.layer_compilation import CompiledLayers, is_refusal

Around = Callable[[], AbstractContextManager[None]]  # of the forward and backward of a batch
Run = Callable[[dict[str, object]], Tensor]  # them, and the loss


@dataclass
class StepAttempts:
    """How the batches of a step go through the model, and what is tried next.

    told: a change from now on, in words.
    smaller: into how many parts a batch goes from now on.
    recompute: lets activations be computed twice, where they are not yet and may be.
    """

    told: Callable[[str], None]
    smaller: Callable[[int], None] = lambda _: None
    recompute: Callable[[], None] | None = None
    around: Sequence[Around] = ()
    compiled: CompiledLayers | None = None
    together: bool = False  # with other processes, through parts of one model: none of them can try another way alone
    count: int = 1  # parts of a batch
    batches: list[Batch] = field(default_factory=list)  # of the step in hand

    def loss(self, batch: Batch, run: Run, begin_again: Callable[[], None]) -> Tensor:
        """Of one batch more of a step. ``begin_again`` forgets all that the step has left so far.

        TrainError where nothing is left to change.
        """
        self.batches.append(batch)
        loss, error = self._attempt([batch], run)
        while loss is None:
            self._change(error)
            begin_again()
            loss, error = self._attempt(self.batches, run)
        return loss

    def _attempt(self, batches: Sequence[Batch], run: Run) -> tuple[Tensor | None, Exception | None]:
        """The loss of the last one, or what was in the way, without the tensors that it holds."""
        loss = None
        try:
            for batch in batches:
                losses = [self._around(part, run) for part in parts(batch, self.count)]
                loss = torch.stack(losses).sum() if len(losses) > 1 else losses[0]
        except Exception as error:
            if not (is_out_of_memory(error) or (self.compiled and is_refusal(error))):
                raise
            return None, error.with_traceback(None)
        return loss, None

    def _around(self, batch: dict[str, object], run: Run) -> Tensor:
        with ExitStack() as stack:
            for around in (*self.around, *([self.compiled.on] if self.compiled else [])):
                stack.enter_context(around())
            return run(batch)

    def _change(self, error: Exception | None) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        assert error is not None
        if self.compiled and not is_out_of_memory(error):
            self.compiled.drop()
            self.compiled = None
            self.told(f"layers are not compiled: {(str(error).splitlines() or ['?'])[0]}")
        elif self.together:
            raise TrainError(
                "out of memory with a part of the base in each process",
                "lower train.batch_size (and raise train.accumulation), data.max_length or train.lora.rank",
            ) from error
        elif self.count < max(map(units, self.batches)):
            self.count *= 2
            self.smaller(self.count)
        elif self.recompute:
            self.recompute()
            self.recompute = None
            self.told("out of memory with one row at once: activations are computed twice from now on")
        else:
            together = any(LABEL in batch for batch in self.batches)
            what = "rows that are compared with each other" if together else "one row at once"
            first = "train.batch_size, " if together else ""
            raise TrainError(
                f"out of memory with {what}", f"lower {first}data.max_length or train.lora.rank"
            ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the main memory, had no room for a tensor."""
    words = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in words or "CUDA out of memory" in words)
    )
