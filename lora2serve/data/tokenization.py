"""Data sets in token ids, with a label for each: what the trainer is given.

Most sets take a second or two, here. What takes longer is done in several processes, and kept for the next run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from lora2serve.config.data_recipe import DataRecipe
from lora2serve.data import sample_cache
from lora2serve.data.data_sets import DataSet
from lora2serve.data.rendering import Renderer
from lora2serve.data.rows import LabeledRow, PreferenceRow, Row
from lora2serve.data.sample_rendering import render_rows
from lora2serve.data.sample_workers import in_processes
from lora2serve.data.samples import Sample, SampleBatch
from lora2serve.data.served_template import ChatTemplate
from lora2serve.errors import DataError, EngineError
from lora2serve.progress import Progress
from lora2serve.system.hardware import cores

ALONE = 2.0  # seconds in which most sets are done, before anything else is tried
WORTH_A_PROCESS = 5.0  # seconds of one core, where a process takes about two to start


def tokenize_all(data: DataSet, template: ChatTemplate, recipe: DataRecipe, progress: Progress) -> list[Sample]:
    """Every row in tokens; DataError names the line of a row that the chat template refuses."""
    with progress.track("tokenize", len(data.rows)) as advance:
        batch = _tokenize(data.rows, template, recipe, progress, advance)
    if batch.problem:
        raise DataError(f"{data.where(batch.problem.row)}: {batch.problem.message}", batch.problem.hint)
    template.prints_date |= batch.prints_date
    for what, count in sorted(batch.losses.items()):
        progress.warn(f"{data.path}: the chat template leaves out {what} in {count} of {len(data.rows)} rows")
    return _marked(batch.samples, data)


def _marked(samples: list[Sample], data: DataSet) -> list[Sample]:
    """With what the rows say of their answers; of a pair the second one is rejected."""
    marked, before = list[Sample](), -1
    for sample in samples:
        row = data.rows[sample.row]
        wrong = isinstance(row, PreferenceRow) and sample.row == before
        wrong |= isinstance(row, LabeledRow) and not row.label
        marked.append(replace(sample, right=False) if wrong else sample)
        before = sample.row
    return marked


def _tokenize(
    rows: Sequence[Row], template: ChatTemplate, recipe: DataRecipe, progress: Progress,
    advance: Callable[[int], None], alone: float = ALONE,
) -> SampleBatch:  # fmt: skip
    renderer = Renderer(template)
    batch = render_rows(rows[:1], renderer, recipe, 0, advance)  # which takes longer than the others
    start = time.process_time()
    if not batch.problem:
        batch.add(render_rows(rows[1:], renderer, recipe, 1, advance, alone))
    left = len(rows) - batch.rows
    if batch.problem or not left:
        return batch
    work = (time.process_time() - start) / (batch.rows - 1) * left
    key = sample_cache.key_of(rows, template, recipe)
    known = sample_cache.load(key, len(rows), len(template.tokenizer)) if key else None
    if known:
        advance(left)
        return known
    processes = min(cores(), int(work / WORTH_A_PROCESS))
    if key and processes > 1:
        try:
            for part in in_processes(rows[batch.rows :], batch.rows, template, recipe, processes, advance):
                batch.add(part)
        except EngineError as error:
            progress.note(f"{error.message}: the other rows are tokenized by this process")
    if not batch.problem and batch.rows < len(rows):
        batch.add(render_rows(rows[batch.rows :], renderer, recipe, batch.rows, advance))
    if key and not batch.problem and (reason := sample_cache.store(key, batch)):
        progress.note(reason)
    return batch
