"""What a calibrated export is measured on: rows in the token ids that training saw."""

from __future__ import annotations

from pathlib import Path

from lora2serve.config.data_recipe import DataRecipe
from lora2serve.data import data_sets
from lora2serve.data.end_tokens import stop_ids
from lora2serve.data.readers import Pin
from lora2serve.data.served_template import ChatTemplate
from lora2serve.data.tokenization import tokenize_all
from lora2serve.data.tokenizer import load_tokenizer
from lora2serve.progress import Progress


def calibration_ids(recipe: DataRecipe, tokenizer: Path, base: Path, pin: Pin, progress: Progress) -> list[list[int]]:
    """The training rows of ``recipe`` by the tokenizer of a directory, for a model that ends where ``base`` does."""
    template = ChatTemplate(load_tokenizer(tokenizer), tuple(stop_ids(base)))  # which has the run's chat template
    rows = data_sets.load(recipe, pin).train.in_form(recipe.form, template.tokenizer.chat_template)
    return [sample.input_ids for sample in tokenize_all(rows, template, recipe, progress)]


def tokenizer_of(adapter: Path | None, base: Path) -> Path:
    """The directory of the trained tokenizer: beside the adapter, or the base's."""
    return adapter if adapter and (adapter / "tokenizer.json").is_file() else base
