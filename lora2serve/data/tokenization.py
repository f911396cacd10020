"""Data sets in token ids, with a label for each: what the trainer is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lora2serve.config.data_recipe import DataRecipe
from lora2serve.data.data_sets import DataSet
from lora2serve.data.rendering import IGNORE, RenderedSample, Renderer
from lora2serve.data.served_template import ChatTemplate
from lora2serve.errors import DataError
from lora2serve.progress import Progress


@dataclass(frozen=True)
class Sample:
    """What is trained at once, in token ids; ``labels`` has ``IGNORE`` where no loss is taken."""

    input_ids: list[int]
    labels: list[int]
    cut: bool  # whether it was longer than max_length
    row: int = 0  # index of its row in the data set; a conversation may give several samples

    @property
    def learned(self) -> bool:
        """Whether a loss is taken on any token: the first one has nothing before it to be predicted from."""
        return any(label != IGNORE for label in self.labels[1:])


def tokenize_all(data: DataSet, template: ChatTemplate, recipe: DataRecipe, progress: Progress) -> list[Sample]:
    """Every row in tokens; DataError names the line of a row that the chat template refuses."""
    renderer, samples, losses = Renderer(template), list[Sample](), Counter[str]()
    with progress.track("tokenize", len(data.rows)) as advance:
        for index, row in enumerate(data.rows):
            try:
                rendered = renderer.render(row, completion_only=recipe.completion_only)
            except DataError as error:
                raise DataError(f"{data.where(index)}: {error.message}", error.hint) from None
            except Exception as error:  # a template raises what it likes
                raise DataError(f"{data.where(index)}: the chat template refuses it: {error}") from error
            samples += cut(rendered.samples, recipe.max_length, index)
            losses.update(rendered.losses)
            advance(1)
    for what, count in sorted(losses.items()):
        progress.warn(f"{data.path}: the chat template leaves out {what} in {count} of {len(data.rows)} rows")
    return samples


def cut(samples: Sequence[RenderedSample], limit: int, row: int) -> list[Sample]:
    """The samples of a row as they are trained: no longer than ``limit`` tokens."""
    return [Sample(sample.ids[:limit], sample.labels[:limit], len(sample.ids) > limit, row) for sample in samples]
