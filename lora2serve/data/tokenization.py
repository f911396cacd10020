"""Data sets in token ids, with a label for each: what the trainer is given."""

from __future__ import annotations

from dataclasses import dataclass

from lora2serve.config.recipe import DataRecipe
from lora2serve.data.data_sets import DataSet
from lora2serve.data.rendering import IGNORE, render_row
from lora2serve.data.rows import Row
from lora2serve.data.tokenizer import Tokenizer
from lora2serve.errors import DataError
from lora2serve.progress import Progress


@dataclass(frozen=True)
class Sample:
    """One row in token ids; ``labels`` has ``IGNORE`` where no loss is taken."""

    input_ids: list[int]
    labels: list[int]
    cut: bool  # whether it was longer than max_length

    @property
    def learned(self) -> bool:
        """Whether a loss is taken on any token: the first one has nothing before it to be predicted from."""
        return any(label != IGNORE for label in self.labels[1:])


def tokenize_all(data: DataSet, tokenizer: Tokenizer, recipe: DataRecipe, progress: Progress) -> list[Sample]:
    """Every row in tokens; DataError names the line of a row that the chat template refuses."""
    samples = []
    with progress.track("tokenize", len(data.rows)) as advance:
        for index, row in enumerate(data.rows):
            try:
                samples.append(tokenize(row, tokenizer, recipe))
            except DataError as error:
                raise DataError(f"{data.where(index)}: {error.message}", error.hint) from None
            except Exception as error:  # a template raises what it likes
                raise DataError(f"{data.where(index)}: the chat template refuses it: {error}") from error
            advance(1)
    return samples


def tokenize(row: Row, tokenizer: Tokenizer, recipe: DataRecipe) -> Sample:
    """Token ids and labels of one row, cut at ``max_length``."""
    rendered = render_row(row, tokenizer, completion_only=recipe.completion_only)
    limit = recipe.max_length
    return Sample(rendered.ids[:limit], rendered.labels[:limit], len(rendered.ids) > limit)
