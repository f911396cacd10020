"""Worker processes that train, as many as are asked for at a time, each with a GPU of its own where there are any."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lora2serve.errors import EngineError
from lora2serve.sweeping.gpu_leases import leased_gpu
from lora2serve.system import scratch
from lora2serve.system.hardware import cores, usable_gpus
from lora2serve.system.worker_process import WorkerProcess

LOOK = 0.1  # seconds between two looks at what still runs


class TrainingProcess(WorkerProcess):
    """Its errors are those of the training, without a name before them."""

    def failed(self, message: dict[str, str]) -> EngineError:  # type: ignore[override]
        """In the training's own words."""
        return EngineError(message["error"], message["hint"])


@dataclass
class LeasedWorkers:
    """Children of this process that run ``worker``, lent one by one. Called from several threads.

    Without a GPU a child that is well is used again: its libraries take longer to load than a small model to train. On
    a GPU it ends with its job, and with it whatever it left in the memory there.
    """

    worker: str
    gpus: tuple[str, ...] = ()
    threads: int = 0
    stopped: bool = False
    _running: list[TrainingProcess] = field(default_factory=list)
    _idle: list[TrainingProcess] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def lent(self) -> Iterator[TrainingProcess]:
        """A child for one job, once a GPU is free for it; EngineError once all are stopped."""
        with leased_gpu(self.gpus, lambda: self.stopped) as gpu, self._process(gpu) as process:
            yield process

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send it to all that run, and start none any more; each thread sees its child end, and reaps it."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.send_signal(number)

    def wait(self) -> None:
        """Until none runs any more."""
        while self._running:
            time.sleep(LOOK)

    def close(self) -> None:
        """Nothing more comes."""
        while self._idle:
            self._idle.pop().close()

    @contextmanager
    def _process(self, gpu: str | None) -> Iterator[TrainingProcess]:
        with self._lock:
            if self.stopped:
                raise EngineError("stopped")
            process = self._idle.pop() if self._idle else self._started(gpu)
            self._running.append(process)
        try:
            yield process
        except BaseException:
            process.close()
            raise
        else:
            if gpu is not None:
                process.close()
            else:
                self._idle.append(process)
        finally:
            with self._lock:
                self._running.remove(process)

    def _started(self, gpu: str | None) -> TrainingProcess:
        options = {"gpu": gpu, "threads": self.threads}
        return TrainingProcess("training", self.worker, options, scratch.log_file("training"))


def shares(jobs: int | None) -> tuple[tuple[str, ...], int, int]:
    """The GPUs, the threads of each process (0: its own choice), and how many run at a time: one a GPU, or one."""
    gpus = usable_gpus()
    count = jobs or len(gpus) or 1
    return gpus, max(1, cores() // count) if count > 1 and not gpus else 0, count
