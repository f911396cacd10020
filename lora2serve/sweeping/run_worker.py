"""The worker process of several fine-tunes: trains one recipe after another, and passes on what each has to say."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lora2serve.api.train_run import train
from lora2serve.progress import Silent
from lora2serve.sweeping.run_outcome import eval_loss
from lora2serve.sweeping.trial_worker import use_gpu

if TYPE_CHECKING:
    from lora2serve.system.worker_protocol import Link


class RunWorker:
    """Run by ``many_runs.py``. ``gpu``: the only one that it uses; ``threads`` of torch, 0 for its own choice."""

    def __init__(self, link: Link, gpu: str | None, threads: int) -> None:
        self._link = link
        use_gpu(gpu, threads)

    def train(
        self, recipe: str, overrides: Sequence[str], gpu: str | None, folder: str, resume: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> dict[str, object]:  # fmt: skip
        """One fine-tune in ``folder``: its run, its eval loss, and the seconds that it took.

        environment: what a launcher would set for one of several processes.
        """
        os.environ.update(environment or {})
        gc.collect()  # the model of the one before
        os.chdir(folder)
        begin = time.monotonic()
        run = train(recipe, overrides=overrides, resume=resume, gpu=gpu, progress=LinkProgress(self._link))
        return {"run": str(run.path), "eval_loss": eval_loss(run), "seconds": time.monotonic() - begin}


class LinkProgress(Silent):
    """Words to the parent; bars of several trainings at once are for nobody."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def note(self, text: str) -> None:
        """One line of information."""
        self._link.ask({"note": text})

    def warn(self, text: str) -> None:
        """One line that the user should act on."""
        self._link.ask({"warning": text})
