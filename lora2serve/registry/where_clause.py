"""``--where 'rank <= 16 and not base = org/model'``: a small language, made into a condition of SQLAlchemy.

    condition   = clause {"or" clause}
    clause      = term {"and" term}
    term        = "not" term | "(" condition ")" | field operator value
    operator    = "=" | "!=" | "<" | "<=" | ">" | ">="

A field is one of ``FIELDS``, or SUITE.METRIC, the newest value of it. A value is a number, a word, or text in quotes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Numeric, and_, func, not_, or_, select, true, tuple_
from sqlalchemy.types import Float, Integer

from lora2serve.config.schema import show
from lora2serve.errors import UsageError, did_you_mean
from lora2serve.registry.tables import scores, versions

TOKEN = re.compile(r"\s*(?:(?P<quoted>'[^']*'|\"[^\"]*\")|(?P<mark><=|>=|!=|[=<>()])|(?P<word>[^\s'\"<>=!()]+))")
FIELDS = (
    "name", "number", "domain", "task", "note", "author", "state", "created", "added", "run", "base", "method", "rank",
    "alpha", "learning_rate", "steps", "rows", "quantization", "bytes",
)  # fmt: skip
NUMBERS = {name for name in FIELDS if isinstance(versions.c[name].type, Integer | Float | Numeric)}
OPERATORS = ("=", "!=", "<", "<=", ">", ">=")
DEEPEST = 50  # parentheses and "not" inside each other
EXAMPLE = "such as 'rank <= 16 and base = org/model', or 'medqa.acc > 0.7'"


def parse_where(text: str) -> ColumnElement[bool]:
    """The condition; UsageError, which shows where it cannot be read."""
    if not text.strip():
        return true()
    parser = _WhereParser(text, _tokens(text))
    condition = parser.condition()
    if parser.position < len(parser.tokens):
        raise parser.error("and, or")
    return condition


def metric_name(name: str) -> tuple[str, str]:
    """Suite and metric of ``medqa.acc``; UsageError for what is no such name."""
    suite, _, metric = name.partition(".")
    if not suite or not metric:
        raise UsageError(f"--metric {name}: expected SUITE.METRIC", "such as medqa.acc, or heldout.loss")
    return suite, metric


@dataclass(frozen=True)
class Token:
    """``kind`` is quoted, mark or word."""

    kind: str
    text: str


@dataclass
class _WhereParser:
    source: str
    tokens: Sequence[Token]
    position: int = 0
    depth: int = 0

    def condition(self) -> ColumnElement[bool]:
        clauses = [self._clause()]
        while self._takes("or"):
            clauses.append(self._clause())
        return or_(*clauses)

    def error(self, expected: str) -> UsageError:
        found = show(self.tokens[self.position].text) if self.position < len(self.tokens) else "the end"
        return UsageError(f"--where {show(self.source)}: {found}, expected {expected}", EXAMPLE)

    def _clause(self) -> ColumnElement[bool]:
        terms = [self._term()]
        while self._takes("and"):
            terms.append(self._term())
        return and_(*terms)

    def _term(self) -> ColumnElement[bool]:
        self.depth += 1
        if self.depth > DEEPEST:
            raise UsageError(f"--where {show(self.source)}: nested too deep", EXAMPLE)
        try:
            if self._takes("not"):
                return not_(self._term())
            if self._takes("("):
                inner = self.condition()
                if not self._takes(")"):
                    raise self.error("')'")
                return inner
            return self._comparison()
        finally:
            self.depth -= 1

    def _comparison(self) -> ColumnElement[bool]:
        name = self._next("word", "a field")
        _refuse_unknown_field(name, self.source)
        sign = self._next("mark", "an operator (=, !=, <, <=, >, >=)")
        if sign not in OPERATORS:
            self.position -= 1
            raise self.error("an operator (=, !=, <, <=, >, >=)")
        if self.position >= len(self.tokens) or self.tokens[self.position].kind == "mark":
            raise self.error("a value")
        value = self._value(numeric=name in NUMBERS or "." in name)
        return versions.c[name].bool_op(sign)(value) if name in FIELDS else _measured(name, sign, value)

    def _value(self, *, numeric: bool) -> object:
        text = self.tokens[self.position].text
        if not numeric:
            self.position += 1
            return text
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self.error("a number")
        self.position += 1
        return value

    def _next(self, kind: str, expected: str) -> str:
        if self.position >= len(self.tokens) or self.tokens[self.position].kind != kind:
            raise self.error(expected)
        self.position += 1
        return self.tokens[self.position - 1].text

    def _takes(self, word: str) -> bool:
        """Whether that comes next; then it is passed."""
        if self.position < len(self.tokens):
            token = self.tokens[self.position]
            if token.kind != "quoted" and token.text.lower() == word:
                self.position += 1
                return True
        return False


def _tokens(text: str) -> list[Token]:
    tokens, end = [], 0
    while end < len(text.rstrip()):
        match = TOKEN.match(text, end)
        if match is None:
            raise UsageError(f"--where {show(text)}: {show(text[end:].strip())} cannot be read", EXAMPLE)
        kind = str(match.lastgroup)
        tokens.append(Token(kind, match[kind][1:-1] if kind == "quoted" else match[kind]))
        end = match.end()
    return tokens


def _refuse_unknown_field(name: str, source: str) -> None:
    suite, _, metric = name.partition(".")
    if name not in FIELDS and not (suite and metric):
        raise UsageError(
            f"--where {show(source)}: unknown field {show(name)}{did_you_mean(name, FIELDS)}",
            f"fields: {', '.join(FIELDS)}, or SUITE.METRIC",
        )


def _measured(name: str, sign: str, value: object) -> ColumnElement[bool]:
    """The newest score of that name fits; never so for a version that was not measured."""
    suite, _, metric = name.partition(".")
    place = func.row_number().over(
        partition_by=(scores.c.name, scores.c.number), order_by=(scores.c.created.desc(), scores.c.id.desc())
    )
    own = (scores.c.suite == suite, scores.c.metric == metric)
    ranked = select(scores.c.name, scores.c.number, scores.c.value, place.label("place")).where(*own).subquery()
    fits = select(ranked.c.name, ranked.c.number).where(ranked.c.place == 1, ranked.c.value.bool_op(sign)(value))
    return tuple_(versions.c.name, versions.c.number).in_(fits)
