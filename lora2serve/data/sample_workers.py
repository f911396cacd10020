"""Rows to samples in several processes: they have the tokenizer, and load neither torch nor the model."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

from lora2serve.config.data_recipe import DataRecipe
from lora2serve.data.rendering import Renderer
from lora2serve.data.rows import Row
from lora2serve.data.sample_rendering import render_rows
from lora2serve.data.samples import SampleBatch, pack, unpack
from lora2serve.data.served_template import ChatTemplate
from lora2serve.system.worker_process import WorkerProcess
from lora2serve.system.worker_protocol import Link

WORKER = "lora2serve.data.sample_workers:SampleWorker"
ROWS_AT_ONCE = 32


class SampleWorker:
    """The side of the child: renders what it is sent."""

    def __init__(self, link: Link, template: bytes, recipe: bytes) -> None:
        self._renderer = Renderer(pickle.loads(template))
        self._recipe: DataRecipe = pickle.loads(recipe)

    def render(self, rows: bytes, first: int) -> dict[str, bytes]:
        """The samples of consecutive rows, of which the first has the index ``first``."""
        return {"samples": pack(render_rows(pickle.loads(rows), self._renderer, self._recipe, first))}


def in_processes(
    rows: Sequence[Row], first: int, template: ChatTemplate, recipe: DataRecipe, processes: int,
    advance: Callable[[int], None],
) -> Iterator[SampleBatch]:  # fmt: skip
    """The samples of ``rows`` in order, of which the first has the index ``first``, up to a row with a problem."""
    options = {"template": pickle.dumps(template), "recipe": pickle.dumps(recipe)}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lora2serve-samples-")))
        free: SimpleQueue[WorkerProcess] = SimpleQueue()
        for number in range(processes):
            log = folder / f"{number}.log"
            free.put(stack.enter_context(WorkerProcess("tokenizing", WORKER, options, log, fork="never")))
        pool = stack.enter_context(ThreadPoolExecutor(processes))

        def render(start: int) -> SampleBatch:
            worker = free.get()
            part = rows[start : start + ROWS_AT_ONCE]
            try:
                answer = worker.call("render", rows=pickle.dumps(part), first=first + start)
            finally:
                free.put(worker)  # a dead one, too: whoever takes it sees that at once
            advance(len(part))
            return unpack(answer["samples"])

        waiting = [pool.submit(render, start) for start in range(0, len(rows), ROWS_AT_ONCE)]
        try:
            for future in waiting:
                part = future.result()
                yield part
                if part.problem:
                    return
        finally:
            for future in waiting:  # those that have not begun
                future.cancel()
