"""Consecutive rows to the samples that are trained, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from lora2serve.config.data_recipe import DataRecipe
from lora2serve.data.rendering import RenderedSample, Renderer
from lora2serve.data.rows import Row
from lora2serve.data.samples import RowProblemAt, Sample, SampleBatch
from lora2serve.errors import DataError, first_line


def render_rows(
    rows: Sequence[Row], renderer: Renderer, recipe: DataRecipe, first: int = 0,
    advance: Callable[[int], None] | None = None, seconds: float = float("inf"),
) -> SampleBatch:  # fmt: skip
    """The samples of ``rows``, of which the first has the index ``first``: of all, or of those done in ``seconds``.

    It ends at the first row that cannot be rendered, which is the ``problem`` of the batch.
    """
    batch, start = SampleBatch(), time.monotonic()
    for index, row in enumerate(rows, first):
        try:
            rendered = renderer.render(row, completion_only=recipe.completion_only)
        except DataError as error:
            batch.problem = RowProblemAt(index, error.message, error.hint)
            break
        except Exception as error:  # a template raises what it likes
            batch.problem = RowProblemAt(index, f"the chat template refuses it: {first_line(error)}", "")
            break
        batch.samples += cut(rendered.samples, recipe.max_length, index)
        batch.losses.update(rendered.losses)
        batch.rows += 1
        if advance:
            advance(1)
        if time.monotonic() - start > seconds:
            break
    batch.prints_date = renderer.template.prints_date
    return batch


def cut(samples: Sequence[RenderedSample], limit: int, row: int) -> list[Sample]:
    """The samples of a row as they are trained: no longer than ``limit`` tokens."""
    return [Sample(sample.ids[:limit], sample.labels[:limit], len(sample.ids) > limit, row) for sample in samples]
