"""What training would be given: every sample with its learned texts, and what the data has that one should know."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, zip_longest

from lora2serve.config.data_recipe import DataRecipe
from lora2serve.data.data_sets import DataSet, DataSets
from lora2serve.data.rendering import IGNORE
from lora2serve.data.rows import SIDES, LabeledRow, PreferenceRow
from lora2serve.data.samples import Sample, row_faults
from lora2serve.data.served_template import ChatTemplate
from lora2serve.data.tokenization import tokenize_all
from lora2serve.progress import Progress

LISTED_ROWS = 5  # of each finding; the others are counted
SHOWN_CHARACTERS = 120
BINS = 8  # of the lengths


@dataclass(frozen=True)
class TextPart:
    """A part of a sample, and whether a loss is taken on it."""

    text: str
    learned: bool


@dataclass(frozen=True)
class TrainedSample:
    """One sample as the trainer gets it. ``row`` is the number of its row in ``source``: a line, or a row's number.

    ``side``: which of two answers it is, chosen or rejected, or whether it is labeled true or false; else empty.
    """

    row: int
    source: str
    ids: list[int]
    labels: list[int]
    cut: bool
    parts: tuple[TextPart, ...]
    side: str = ""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(part.text for part in self.parts)

    @property
    def learned(self) -> list[str]:
        """The texts that a loss is taken on, in order."""
        return [part.text for part in self.parts if part.learned]

    @property
    def learned_tokens(self) -> int:
        return sum(label != IGNORE for label in self.labels)

    def json(self) -> dict[str, object]:
        """As ``lora2serve data --json`` prints it."""
        return {
            "row": self.row, "source": self.source, "ids": self.ids, "labels": self.labels,
            "text": self.text, "learned": self.learned, **({"side": self.side} if self.side else {}),
        }  # fmt: skip


@dataclass(frozen=True)
class DataFinding:
    """Rows that something is to be said of, by ``file:line``."""

    what: str
    rows: tuple[str, ...]

    def __str__(self) -> str:
        more = f" and {len(self.rows) - LISTED_ROWS} more" if len(self.rows) > LISTED_ROWS else ""
        return f"{len(self.rows)} {self.what}: {', '.join(self.rows[:LISTED_ROWS])}{more}"


@dataclass(frozen=True)
class LengthBin:
    """How many samples have from ``first`` to ``last`` tokens."""

    first: int
    last: int
    count: int


@dataclass(frozen=True)
class DataPreview:
    """The samples that are trained, in the order of their rows, and what was found."""

    path: str
    numbers: list[int]  # of its rows, those among them that give no sample
    held_out: list[int]  # numbers of the rows that are kept apart
    samples: list[TrainedSample]
    findings: list[DataFinding]
    losses: list[str]  # what nobody reads, and what the chat template leaves out, each with a count

    @property
    def tokens(self) -> int:
        return sum(len(sample.ids) for sample in self.samples)

    @property
    def learned_tokens(self) -> int:
        return sum(sample.learned_tokens for sample in self.samples)

    def summary(self) -> Iterator[str]:
        """In a few lines."""
        yield _amount(self.path, len(self.numbers), len(self.samples), self.tokens, self.learned_tokens)
        yield f"{len(self.held_out):,} rows are held out" if self.held_out else "no row is held out"
        yield from (str(finding) for finding in self.findings)
        yield from self.losses

    def lengths(self) -> list[LengthBin]:
        """The lengths of the samples, from the shortest to the longest, in bins of one width."""
        lengths = [len(sample.ids) for sample in self.samples] or [0]
        first = min(lengths)
        width = -(-(max(lengths) - first + 1) // BINS)
        counts = Counter((length - first) // width for length in lengths if self.samples)
        starts = range(first, max(lengths) + 1, width)
        return [LengthBin(start, start + width - 1, counts[n]) for n, start in enumerate(starts)]

    def pick(self, rows: int) -> list[TrainedSample]:
        """Those of the first so many rows, of each source about as many, and of each row once."""
        by_source: dict[str, dict[tuple[str, int], None]] = {}
        for sample in self.samples:
            by_source.setdefault(sample.source, {})[sample.source, sample.row] = None
        turns = zip_longest(*by_source.values())  # the first row of each source, the second of each, and so on
        first = set(islice((place for turn in turns for place in turn if place), rows))
        return once([sample for sample in self.samples if (sample.source, sample.row) in first])


def once(samples: Sequence[TrainedSample]) -> list[TrainedSample]:
    """Without those that stand there again, since their set has a weight."""
    return list({(sample.source, sample.row, tuple(sample.ids)): sample for sample in samples}.values())


def first_lines(data: DataSet, samples: Sequence[Sample], template: ChatTemplate) -> Iterator[str]:
    """What a training says of its samples: how much there is, and the first text that is learned."""
    tokens = sum(len(sample.input_ids) for sample in samples)
    learned = sum(label != IGNORE for sample in samples for label in sample.labels)
    yield _amount(data.path, len(data.rows), len(samples), tokens, learned)
    first: dict[str, Sample] = {}
    for sample in samples:
        first.setdefault(_side(sample, data), sample)
    for side, sample in first.items():
        for text in _shown(sample, data, template).learned[:1]:
            short = textwrap.shorten(text, SHOWN_CHARACTERS)
            yield f"the first answer that is {side or 'learned'}: {json.dumps(short, ensure_ascii=False)}"


def _amount(path: str, rows: int, samples: int, tokens: int, learned: int) -> str:
    return (
        f"{path}: {rows:,} rows give {samples:,} samples of {tokens:,} tokens; "
        f"a loss is taken on {learned:,} of them ({learned / max(1, tokens):.0%})"
    )


class _Noting:
    """A progress that keeps the warnings for the preview."""

    def __init__(self, progress: Progress) -> None:
        self.warnings: list[str] = []
        self.note, self.track = progress.note, progress.track

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def preview(sets: DataSets, template: ChatTemplate, recipe: DataRecipe, progress: Progress) -> DataPreview:
    """Tokenizes as training does; DataError as there."""
    noting = _Noting(progress)
    samples = tokenize_all(sets.train, template, recipe, noting)
    held_out = tokenize_all(sets.held_out, template, recipe, _Noting(progress)) if sets.held_out else []
    shown = [_shown(sample, sets.train, template) for sample in samples if sample.learned]
    findings = _findings(sets.train, samples, held_out, recipe)
    apart = sets.held_out.numbers if sets.held_out else []
    return DataPreview(
        sets.train.path, sets.train.numbers, apart, shown, findings, [*sets.warnings(), *noting.warnings]
    )


def _side(sample: Sample, data: DataSet) -> str:
    row = data.rows[sample.row]
    if isinstance(row, PreferenceRow):
        return SIDES[not sample.right]
    return f"labeled {str(row.label).lower()}" if isinstance(row, LabeledRow) else ""


def _shown(sample: Sample, data: DataSet, template: ChatTemplate) -> TrainedSample:
    parts, text, place = list[TextPart](), "", 0
    for learned, run in groupby(label != IGNORE for label in sample.labels):
        place += len(list(run))
        so_far = template.tokenizer.decode(sample.input_ids[:place])  # SentencePiece drops a space at each beginning
        parts.append(TextPart(so_far[len(text) :], learned))
        text = so_far
    source = data.rows[sample.row].source or data.path
    number = data.numbers[sample.row]
    return TrainedSample(number, source, sample.input_ids, sample.labels, sample.cut, tuple(parts), _side(sample, data))


def _findings(
    data: DataSet, samples: Sequence[Sample], held_out: Sequence[Sample], recipe: DataRecipe
) -> list[DataFinding]:
    """By row: what is cut, gives nothing to learn, repeats another, or is held out, too."""
    by_row: dict[int, list[Sample]] = {number: [] for number in range(len(data.rows))}
    for sample in samples:
        by_row[sample.row].append(sample)
    apart = {tuple(sample.input_ids) for sample in held_out}
    seen: set[tuple[tuple[int, ...], ...]] = set()
    faults = row_faults(samples)
    cut, silent, partly, repeated, leaked = list[str](), list[str](), list[str](), list[str](), list[str]()
    first = {data.where(number): number for number in reversed(by_row)}  # a weight has rows stand there several times
    for where, number in sorted(first.items(), key=lambda item: item[1]):
        ids = tuple(tuple(sample.input_ids) for sample in by_row[number])
        cut += [where] if number in faults.cut else []
        silent += [where] if number in faults.silent else []
        partly += [where] if number in faults.partly else []
        repeated += [where] if ids in seen else []
        leaked += [where] if any(one in apart for one in ids) else []
        seen.add(ids)
    rows = [
        (f"rows are cut at {recipe.max_length} tokens (data.max_length)", cut),
        ("rows have nothing to learn and are dropped", silent),
        ("rows have answers that are not learned, since the conversation before them is too long", partly),
        ("rows repeat another", repeated),
        ("rows are also held out", leaked),
    ]
    return [DataFinding(what, tuple(where)) for what, where in rows if where]
