"""The ``data`` section of a recipe: where rows are, how their keys are called, how they become samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from lora2serve.config.bounds import NotEmpty, Positive, Range
from lora2serve.errors import did_you_mean

COLUMNS = (
    "messages", "conversations", "role", "content", "prompt", "completion", "response", "instruction", "input",
    "output", "question", "answer", "text", "chosen", "rejected", "label", "system", "tools", "chat_template_kwargs",
    "task",
)  # fmt: skip


@dataclass(frozen=True)
class SourceRecipe:
    """One of several data sets.

    ``weight`` is how often each of its rows is seen in one pass: 2 is twice, 0.5 is a half of the rows, which stays the
    same in every pass, and 2.5 is each row twice and a half of them once more.
    """

    path: Annotated[str, NotEmpty("a path or a Hub id")]
    weight: Annotated[float, Positive(1000)] = 1.0
    split: str | None = None  # default: data.split
    subset: str | None = None  # default: data.subset


Sources = str | tuple[Annotated[str, NotEmpty("a path or a Hub id")] | SourceRecipe, ...]


@dataclass(frozen=True)
class DataRecipe:
    """Rows of conversations, ``prompt`` + ``completion`` or ``text``: files, or data sets of the Hub."""

    train: Annotated[Sources, NotEmpty("a path or a Hub id")]
    eval: Annotated[Sources | None, NotEmpty("a path or a Hub id")] = None  # files or sets of their own, or
    # the share of the training rows to hold out, or a split of the data set
    eval_split: Annotated[float | str | None, Range(0.0, 0.9)] = None
    split: str = "train"  # of a data set with splits
    subset: str | None = None  # of a data set with several
    columns: Mapping[str, str] = field(default_factory=dict)  # our key -> what the data calls it
    chat_template: Annotated[str | None, NotEmpty("a file or chatml")] = None  # a file or a format; default: the base's
    new_tokens: tuple[Annotated[str, NotEmpty("a token")], ...] = ()  # which the base's tokenizer does not have
    form: Literal["chat", "raw"] = "chat"  # of prompt + completion, where the model has a chat template
    max_length: Annotated[int, Range(8, 1 << 20)] = 1024  # tokens; longer rows are cut
    packing: bool = False
    completion_only: bool = True  # loss on what the assistant says, not on the prompt

    def sources(self, part: Literal["train", "eval"]) -> tuple[SourceRecipe, ...]:
        """What is trained on, or held out, with every field filled in."""
        value = self.train if part == "train" else self.eval or ()
        return tuple(self._source(item) for item in ((value,) if isinstance(value, str) else value))

    def problems(self) -> list[str]:
        """What no type and no bound of a single field can rule out."""
        problems = []
        if self.eval is not None and self.eval_split is not None:
            problems.append("data.eval_split: expected either eval or eval_split, not both")
        if self.eval_split == "":
            problems.append("data.eval_split: empty, expected a share such as 0.05, or the name of a split")
        if any(source.weight != 1 for source in self.sources("eval")):
            problems.append("data.eval: a weight, but held-out rows are scored once each: leave it out")
        twice = sorted(text for text, count in Counter(self.new_tokens).items() if count > 1)
        problems += [f"data.new_tokens: {text!r} twice" for text in twice]
        problems += [
            f"data.new_tokens: {text!r}, expected a token" for text in self.new_tokens if text and not text.strip()
        ]
        for key in sorted(self.columns.keys() - set(COLUMNS)):
            near = did_you_mean(key, COLUMNS, "data.columns.")
            problems.append(f"data.columns.{key}: unknown key{near}, expected one of {', '.join(COLUMNS)}")
        return problems

    def _source(self, item: str | SourceRecipe) -> SourceRecipe:
        source = SourceRecipe(item) if isinstance(item, str) else item
        return SourceRecipe(source.path, source.weight, source.split or self.split, source.subset or self.subset)
