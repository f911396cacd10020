"""Scorers: from an answer and what was expected to a score between 0 and 1."""

from __future__ import annotations

import hashlib
import json
import math
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from lora2serve.config.bounds import Range
from lora2serve.config.schema import show
from lora2serve.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from lora2serve.evaluation.suite import SuiteItem

Kind = Literal[
    "exact", "normalized", "f1", "contains", "regex", "number", "json_schema", "choice", "python", "judge"
]  # fmt: skip
KINDS: tuple[str, ...] = Kind.__args__  # type: ignore[attr-defined]
RULES = 2  # one more where a scorer scores otherwise than before: scores of other rules do not compare
METRICS = {"f1": "f1", "python": "score", "judge": "judge"}  # what the mean is called; of the others "acc"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?|-?\.\d+")
ARTICLES = re.compile(r"\b(a|an|the)\b")
MINUS = "\N{MINUS SIGN}"
SIGN = re.compile(r"(?!(?<!\w)-\.?\d|(?<![^\W\d])\.\d)(?:[^\w\s]|_)")  # but those of a number: -5, 0.5


@dataclass(frozen=True)
class ScorerRecipe:
    """A scorer with its settings: ``pattern`` of regex, ``tolerance`` (relative) of number, ``schema`` (a file) of
    json_schema, ``function`` (FILE.py:NAME) of python, ``url``, ``model`` and ``criterion`` of judge.
    """

    kind: Kind
    pattern: str = ""
    tolerance: Annotated[float, Range(0.0, 1e9)] = 1e-6
    schema: str = ""
    function: str = ""
    url: str = ""
    model: str | None = None
    criterion: str = ""


class Score(Protocol):
    """What one kind does."""

    def __call__(self, answer: str, item: SuiteItem) -> float: ...


@dataclass(frozen=True)
class Scorer:
    """``identity`` is all that its scores depend on."""

    kind: str
    identity: str
    score: Score = field(compare=False)

    @property
    def by_likelihood(self) -> bool:
        """Whether no answer is asked for: the likeliest of the item's choices is."""
        return self.kind == "choice"

    @property
    def metric(self) -> str:
        """What the mean of its scores is called."""
        return METRICS.get(self.kind, "acc")

    def lacks(self, item: SuiteItem) -> str:
        """What an item has not that this scorer needs; empty where nothing is missing."""
        if self.by_likelihood and len(item.choices) < 2:
            return f"{len(item.choices)} choices, expected two at least"
        if self.by_likelihood and not set(item.expected) & set(item.choices):
            return f"expected is {show(list(item.expected))}, which is no choice"
        if self.by_likelihood and len(set(item.choices)) < len(item.choices):
            return f"choices are {show(list(item.choices))}, expected each once"
        if self.kind == "contains" and not all(text.strip() for text in item.expected):
            return "expected is an empty text, which stands in every answer"
        if self.kind == "number" and not all(number_in(text) is not None for text in item.expected):
            return f"expected is {show(list(item.expected))}, which is no number"
        if not item.expected and self.kind not in ("regex", "json_schema", "python"):
            return "expected is missing"
        return ""


def make_scorer(recipe: str | ScorerRecipe, home: Path, key: str, problems: list[str]) -> Scorer:
    """The scorer that a suite names; what it needs and cannot be had becomes a problem behind ``key``."""
    if isinstance(recipe, str):
        if recipe not in KINDS:
            problems.append(f"{key}: unknown scorer {show(recipe)}{did_you_mean(recipe, KINDS)}; {', '.join(KINDS)}")
            recipe = "exact"
        recipe = ScorerRecipe(recipe)  # type: ignore[arg-type]
    content = ""
    try:
        score, content = _MAKERS.get(recipe.kind, _plain)(recipe, home)
    except (InputError, re.error, OSError, ValueError) as error:
        problems.append(f"{key}: {recipe.kind}: {getattr(error, 'message', error)}")
        score = exact
    return Scorer(recipe.kind, json.dumps([RULES, asdict(recipe), content]), score)


def exact(answer: str, item: SuiteItem) -> float:
    """The same text, but for space at the edges."""
    return float(answer.strip() in {text.strip() for text in item.expected})


def normalized(answer: str, item: SuiteItem) -> float:
    """The same words: without case, punctuation and articles."""
    return float(normalize(answer) in {normalize(text) for text in item.expected})


def f1(answer: str, item: SuiteItem) -> float:
    """The harmonic mean of precision and recall of words, against the expected text that is nearest (SQuAD)."""
    return max((_f1(normalize(answer).split(), normalize(text).split()) for text in item.expected), default=0.0)


def contains(answer: str, item: SuiteItem) -> float:
    """An expected text stands in the answer, whatever its case."""
    return float(any(text.strip().casefold() in answer.casefold() for text in item.expected))


def normalize(text: str) -> str:
    """Words as ``normalized`` and ``f1`` see them; a text of which nothing would be left stays, such as "A" or "+"."""
    folded = unicodedata.normalize("NFKC", text).casefold().replace(MINUS, "-")
    plain = " ".join(SIGN.sub(_without_punctuation, folded).split())
    return " ".join(ARTICLES.sub(" ", plain).split()) or plain or folded.strip()


def number_in(text: str) -> float | None:
    """The last number in a text; None where there is none."""
    found = NUMBER.findall(text.replace(MINUS, "-"))
    return float(found[-1].replace(",", "")) if found else None


def choice(answer: str, item: SuiteItem) -> float:
    """``answer`` is the choice that the model finds likeliest."""
    return float(answer in item.expected)


def _f1(answer: Sequence[str], expected: Sequence[str]) -> float:
    if not answer or not expected:
        return float(answer == expected)
    common = (Counter(answer) & Counter(expected)).total()
    return 2 * common / (len(answer) + len(expected))


def _without_punctuation(match: re.Match[str]) -> str:
    sign = match[0]
    return "" if sign in string.punctuation or unicodedata.category(sign).startswith("P") else sign


def _plain(recipe: ScorerRecipe, home: Path) -> tuple[Score, str]:
    return {"exact": exact, "normalized": normalized, "f1": f1, "contains": contains, "choice": choice}[recipe.kind], ""


def _regex(recipe: ScorerRecipe, home: Path) -> tuple[Score, str]:
    """The pattern is found; where it has a group and something is expected, the group is that."""
    if not recipe.pattern:
        raise ValueError("pattern is missing")
    pattern = re.compile(recipe.pattern, re.DOTALL)

    def score(answer: str, item: SuiteItem) -> float:
        match = pattern.search(answer)
        if match is None or not pattern.groups or not item.expected:
            return float(match is not None)
        return float((match[1] or "").strip() in {text.strip() for text in item.expected})

    return score, ""


def _number(recipe: ScorerRecipe, home: Path) -> tuple[Score, str]:
    def score(answer: str, item: SuiteItem) -> float:
        value = number_in(answer)
        expected = [number_in(text) for text in item.expected]
        return float(
            value is not None
            and any(math.isclose(value, known, rel_tol=recipe.tolerance) for known in expected if known is not None)
        )

    return score, ""


def _json_schema(recipe: ScorerRecipe, home: Path) -> tuple[Score, str]:
    """The answer, or what stands in its first fence, is JSON that the schema takes."""
    from jsonschema import Draft202012Validator, SchemaError

    if not recipe.schema:
        raise ValueError("schema is missing: a file with a JSON schema")
    text = (home / recipe.schema).read_text(encoding="utf-8")
    schema = json.loads(text)
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"{recipe.schema}: {error.message}") from None
    validator = Draft202012Validator(schema)

    def score(answer: str, item: SuiteItem) -> float:
        value = parsed_json(answer)
        return float(value is not None and validator.is_valid(value[0]))

    return score, text


def parsed_json(answer: str) -> tuple[object] | None:
    """The JSON value that an answer is, with or without a fence around it; None where it is none."""
    fenced = re.search(r"```(?:json)?\s*\n(.*?)```", answer, re.DOTALL)
    try:
        return (json.loads(fenced[1] if fenced else answer, parse_constant=_no_json),)
    except (ValueError, RecursionError):
        return None


def _no_json(constant: str) -> object:
    """Python reads NaN and Infinity, and nobody else does."""
    raise ValueError(constant)


def _python(recipe: ScorerRecipe, home: Path) -> tuple[Score, str]:
    """``function(answer, expected, question)``, which returns a number from 0 to 1 or a bool."""
    file, _, name = recipe.function.rpartition(":")
    if not file or not name.isidentifier():
        raise ValueError(f"function is {show(recipe.function)}, expected FILE.py:NAME")
    source = (home / file).read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": Path(file).stem, "__file__": str(home / file)}
    try:
        with redirect_stdout(sys.stderr):  # stdout is for results
            exec(compile(source, str(home / file), "exec"), namespace)  # the user's own file, as a suite names it
    except (Exception, SystemExit) as error:
        raise ValueError(f"{file}: {type(error).__name__}: {error}") from None
    function = namespace.get(name)
    if not callable(function):
        raise ValueError(f"{file}: no function {name}")

    def score(answer: str, item: SuiteItem) -> float:
        try:
            with redirect_stdout(sys.stderr):
                value = function(answer, list(item.expected), item.question)
        except (Exception, SystemExit) as error:  # whose exit code is not ours
            raise InputError(f"{recipe.function}: item {item.name}: {type(error).__name__}: {error}") from error
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"{recipe.function}: item {item.name}: {show(value)}, expected a number from 0 to 1")
        return float(value)

    return score, hashlib.sha256(source.encode()).hexdigest()


def _judge(recipe: ScorerRecipe, home: Path) -> tuple[Score, str]:
    from lora2serve.evaluation.judge import Judge

    if not recipe.url:
        raise ValueError("url is missing: a server that speaks OpenAI's API")
    return Judge(recipe.url, recipe.model, recipe.criterion).score, ""


_MAKERS: dict[str, Callable[[ScorerRecipe, Path], tuple[Score, str]]] = {
    "regex": _regex,
    "number": _number,
    "json_schema": _json_schema,
    "python": _python,
    "judge": _judge,
}
