"""A suite: what is asked, what is expected, how an answer is scored, and how it is decoded; known by its sha256.

A suite is a YAML file beside a file of rows, or a file of rows alone. A row is ``{prompt | messages, expected,
choices, task, group, id}``, or a row as training takes it, whose last answer is what is expected.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

from lora2serve.artifacts.suite_scores import NAME
from lora2serve.config.bounds import NotEmpty, Range
from lora2serve.config.schema import build, read_keys, show
from lora2serve.data.message_forms import RowProblem, read_messages
from lora2serve.data.readers import read_values
from lora2serve.data.row_forms import RowReader, as_conversation
from lora2serve.data.rows import CompletionRow, LabeledRow, Message, TextRow, answered
from lora2serve.data.text_readers import Unreadable
from lora2serve.errors import DataError, RecipeError
from lora2serve.evaluation.scorers import Scorer, ScorerRecipe, make_scorer

EXAMPLE = "such as `rows: medqa.jsonl` and `scorer: normalized`"
FORMS = "a row is {prompt, expected}, {prompt, choices, expected}, or a row as training takes it"
OWN = ("expected", "choices")  # of a row that is made for a suite
LISTED = 10
HELD_OUT = "answers"  # the suite of a run's held-out rows


@dataclass(frozen=True)
class SuiteRecipe:
    """A suite's YAML file. ``tasks`` has the scorers of some tasks, ``columns`` other names of keys."""

    rows: Annotated[str, NotEmpty("a file of rows")]
    name: str | None = None  # default: the file's name
    scorer: str | ScorerRecipe = "normalized"
    tasks: Mapping[str, str | ScorerRecipe] = field(default_factory=dict)
    system: str = ""
    max_tokens: Annotated[int, Range(1, 1 << 20)] = 256
    temperature: Annotated[float, Range(0.0, 100.0)] = 0.0
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoding:
    """How answers are made; ``temperature`` 0 takes the likeliest token each time."""

    max_tokens: int = 256
    temperature: float = 0.0


@dataclass(frozen=True)
class SuiteItem:
    """One question; each of ``expected`` is right. Items of one ``group``, a document, say, are drawn together."""

    name: str
    messages: tuple[Message, ...]
    expected: tuple[str, ...]
    choices: tuple[str, ...] = ()
    task: str = ""
    group: str = ""

    @property
    def question(self) -> str:
        """The last turn, as a report shows it."""
        return self.messages[-1]["content"] or ""

    @property
    def prompt_sha256(self) -> str:
        """Of all that is asked."""
        return hashlib.sha256(_canonical(list(self.messages)).encode()).hexdigest()


@dataclass(frozen=True)
class Suite:
    """What one evaluation asks; ``scorers`` are those of the tasks that have one of their own."""

    name: str
    items: tuple[SuiteItem, ...]
    scorer: Scorer
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    decoding: Decoding = field(default_factory=Decoding)
    source: str = ""
    notes: tuple[str, ...] = ()  # what was left out, in words

    def scorer_of(self, item: SuiteItem) -> Scorer:
        """That of its task, or the suite's."""
        return self.scorers.get(item.task, self.scorer)

    def has_truth(self, item: SuiteItem) -> bool:
        """Whether an answer to it can be scored."""
        return not self.scorer_of(item).lacks(item)

    def of_task(self, task: str | None) -> tuple[SuiteItem, ...]:
        """The items of one task, or all."""
        return tuple(item for item in self.items if task is None or item.task == task)

    def with_truth(self) -> Suite | None:
        """The items that can be scored; None where there are none."""
        items = tuple(item for item in self.items if self.has_truth(item))
        return replace(self, items=items) if items else None

    @property
    def sha256(self) -> str:
        """Of the items, the scorers and the decoding: two scores are comparable where it is the same."""
        content = {
            "items": [asdict(item) for item in self.items],
            "scorers": {"": self.scorer.identity, **{task: scorer.identity for task, scorer in self.scorers.items()}},
            "decoding": asdict(self.decoding),
        }
        return hashlib.sha256(_canonical(content).encode()).hexdigest()


def read_suite(path: Path, most: int | None = None, *, truth: bool = True) -> Suite:
    """A YAML file, or a file of rows alone; ``most``: only so many of its first items.

    Without ``truth`` rows need nothing that is expected: captured requests, say.

    RecipeError names every problem of the one, DataError every bad row of the other.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file", "a suite is a YAML file, or a file of rows")
    if path.suffix not in (".yaml", ".yml"):
        return of_rows(path, _plain_name(path.stem), SuiteRecipe(str(path)), path.resolve().parent, most, truth=truth)
    content, problems = read_keys(path, EXAMPLE)
    recipe = build(SuiteRecipe, content, problems)
    name = recipe.name or _plain_name(path.stem)
    if not NAME.fullmatch(name):
        problems.append(f"name: {show(name)}, expected letters, digits, '_' and '-'")
    if problems:
        _scorers(recipe, path.resolve().parent, problems)  # what is wrong with those, too
        raise RecipeError("\n".join(f"{path}: {problem}" for problem in problems), EXAMPLE)
    if not (path.parent / recipe.rows).is_file():
        raise DataError(f"{path}: rows: {path.parent / recipe.rows}: no such file", "rows lie relative to the suite")
    return of_rows(path.parent / recipe.rows, name, recipe, path.resolve().parent, most, truth=truth)


def of_rows(
    path: Path, name: str, recipe: SuiteRecipe, home: Path, most: int | None = None, *, truth: bool = True
) -> Suite:
    """The suite of a file of rows; what its scorers name lies relative to ``home``."""
    problems: list[str] = []
    scorer, scorers = _scorers(recipe, home, problems)
    if problems:
        raise RecipeError("\n".join(f"{path}: {problem}" for problem in problems), EXAMPLE)
    reader = _Reader(path, recipe, truth=truth)
    every = reader.items()
    items, repeated = _grouped(every[:most])
    if unknown := [task for task in recipe.tasks if task not in {item.task for item in every}]:
        raise RecipeError(f"{path}: tasks.{unknown[0]}: no row has that task", EXAMPLE)
    notes = reader.notes()
    if repeated:
        notes = (*notes, f"{path}: {repeated} rows ask what others do: each question is one group")
    decoding = Decoding(recipe.max_tokens, recipe.temperature)
    suite = Suite(name, items, scorer, scorers, decoding, str(path), notes)
    lacking = [f"{path}: {item.name}: {reason}" for item in items if (reason := suite.scorer_of(item).lacks(item))]
    if lacking and truth:
        count = f"{len(lacking)} of {len(items)} items cannot be scored:"
        raise DataError("\n".join([count, *lacking[:LISTED]]), FORMS)
    return suite


def _grouped(items: Sequence[SuiteItem]) -> tuple[tuple[SuiteItem, ...], int]:
    """Rows that ask the same are one group, if they name none: the second is no news. And how many rows these are."""
    alike: dict[object, list[str]] = {}
    for item in items:
        if not item.group:
            alike.setdefault((item.prompt_sha256, item.choices), []).append(item.name)
    first = {name: names[0] for names in alike.values() if len(names) > 1 for name in names}
    named = (replace(item, group=f"as {first[item.name]}") if item.name in first else item for item in items)
    return tuple(named), len(first)


def _scorers(recipe: SuiteRecipe, home: Path, problems: list[str]) -> tuple[Scorer, dict[str, Scorer]]:
    """The suite's, and those of its tasks."""
    scorer = make_scorer(recipe.scorer, home, "scorer", problems)
    return scorer, {task: make_scorer(own, home, f"tasks.{task}", problems) for task, own in recipe.tasks.items()}


class _Reader:
    """Rows to items; every bad row is named, and what is left out is counted."""

    def __init__(self, path: Path, recipe: SuiteRecipe, *, truth: bool) -> None:
        self._path, self._recipe, self._rows = path, recipe, RowReader(recipe.columns)
        self._truth = truth
        self._left_out: dict[str, int] = {}

    def items(self) -> list[SuiteItem]:
        """DataError names every row that is none."""
        items, problems, count = list[SuiteItem](), list[str](), 0
        for number, value in read_values(self._path):
            count += 1
            try:
                if isinstance(value, Unreadable):
                    raise RowProblem(value.reason)
                item = self._item(value, number)
                items += [item] if item else []
            except RowProblem as problem:
                problems.append(f"{self._path}:{number}: {problem}")
        problems += _repeated(items, self._path)
        if problems:
            shown = [f"{len(problems)} of {count} rows cannot be used:", *problems[:LISTED]]
            raise DataError("\n".join(shown), FORMS)
        if not items:
            raise DataError(f"{self._path}: no row of {count} has an answer to expect", FORMS)
        return items

    def notes(self) -> tuple[str, ...]:
        """What was left out."""
        return tuple(f"{self._path}: {count} rows left out: {reason}" for reason, count in self._left_out.items())

    def _item(self, value: object, number: int) -> SuiteItem | None:
        if isinstance(value, dict) and any(value.get(self._recipe.columns.get(key, key)) is not None for key in OWN):
            return self._own({str(key): item for key, item in value.items()}, number)
        if not self._truth and isinstance(value, dict) and (asked := _captured(value)) is not None:
            if not asked:
                self._leave_out("captured without their text")
                return None
            return self._own(asked, number)
        read = self._rows.read(value)
        if isinstance(read, LabeledRow) and not read.label:
            self._leave_out("their answer is one not to give")
            return None
        row = answered(read)
        if isinstance(row, TextRow):
            self._leave_out("a text, without a question")
            return None
        chat = as_conversation(row) if isinstance(row, CompletionRow) else row
        answer = chat.messages[-1]
        if chat.tools or answer["role"] != "assistant" or not answer["content"] or len(chat.messages) < 2:
            self._leave_out("the model may call tools in them" if chat.tools else "no answer at their end")
            return None
        return SuiteItem(str(number), self._opened(chat.messages[:-1]), (answer["content"],), task=chat.task)

    def _own(self, value: Mapping[str, object], number: int) -> SuiteItem:
        renamed = {ours: value[theirs] for ours, theirs in self._recipe.columns.items() if theirs in value}
        content = {**value, **renamed}
        choices = _texts(content, "choices")
        expected = content.get("expected")
        if isinstance(expected, int) and not isinstance(expected, bool) and choices:
            if not 0 <= expected < len(choices):
                raise RowProblem(f"expected is {expected}, and there are {len(choices)} choices, the first is 0")
            expected = choices[expected]
        texts = _texts({**content, "expected": expected}, "expected")
        labels = {key: content.get(key) for key in ("id", "task", "group")}
        for key, label in labels.items():
            if label is not None and not isinstance(label, str | int):
                raise RowProblem(f"{key} is {show(label)}, expected text")
        name, task, group = ("" if label is None else str(label) for label in labels.values())
        return SuiteItem(name or str(number), self._opened(_asked(content)), texts, choices, task, group)

    def _opened(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        system = self._recipe.system
        if not system or messages[0]["role"] == "system":
            return tuple(messages)
        return (Message(role="system", content=system), *messages)

    def _leave_out(self, reason: str) -> None:
        self._left_out[reason] = self._left_out.get(reason, 0) + 1


def _captured(row: Mapping[object, object]) -> dict[str, object] | None:
    """The question of a row that has no answer to expect: what a gateway wrote down, or turns that end with a user's.

    None for any other row; empty where the text was not kept.
    """
    if "request_id" in row:
        prompt = row.get("prompt")
        return {"prompt": prompt, "id": f"{row['request_id']}-{row.get('arm', '')}"} if prompt else {}
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    asked = isinstance(last, dict) and last.get("role") == "user"
    alone = isinstance(row.get("prompt"), str) and not row.keys() & {"completion", "response"}
    return {str(key): item for key, item in row.items()} if asked or alone else None


def _asked(content: Mapping[str, object]) -> list[Message]:
    if content.get("messages") is not None:
        messages = read_messages("messages", content["messages"], {})
        if messages[-1]["role"] == "assistant":
            raise RowProblem("messages end with an answer, and expected is beside them: expected one of the two")
        return messages
    prompt = content.get("prompt", content.get("question"))
    if not isinstance(prompt, str) or not prompt:
        raise RowProblem(f"prompt is {show(prompt)}, expected text")
    return [Message(role="user", content=prompt)]


def _texts(content: Mapping[str, object], key: str) -> tuple[str, ...]:
    value = content.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    for item in values:
        if not isinstance(item, str | int | float) or isinstance(item, bool):
            raise RowProblem(f"{key} is {show(item)}, expected text")
    return tuple(str(item) for item in values)


def _repeated(items: Sequence[SuiteItem], path: Path) -> list[str]:
    counts = Counter(item.name for item in items)
    return [f"{path}: id {show(name)} is there {count} times" for name, count in counts.items() if count > 1]


def _plain_name(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", without_accents(stem)).strip("-_") or "suite"


def without_accents(text: str) -> str:
    """``ete`` for ``été``: names of records are in ASCII."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
