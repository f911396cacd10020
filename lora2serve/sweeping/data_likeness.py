"""Cheap figures of held-out rows, and how far two sets of rows are apart by them."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from lora2serve.artifacts.json_record import JsonRecord

MOST_ROWS = 1000  # that are looked at
BUCKETS = 1024  # that words fall into
NEAR = 0.25  # sets up to that distance are near
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class DataFigures(JsonRecord):
    """``words``: the share of each bucket of words; ``lengths``: that of each power of two of characters."""

    WHOLE: ClassVar[bool] = True

    base_loss: float | None = None  # of the base on them, nats a token
    words: Mapping[str, float] = field(default_factory=dict)
    lengths: Mapping[str, float] = field(default_factory=dict)

    def distance(self, other: DataFigures) -> float:
        """From 0, the same, to 1: the mean of the Jensen-Shannon divergences of words and lengths, in bits, and of how
        far the base's losses are apart, as a share of the larger one.
        """
        parts = [_divergence(self.words, other.words), _divergence(self.lengths, other.lengths)]
        if self.base_loss and other.base_loss:
            larger = max(self.base_loss, other.base_loss)
            parts.append(abs(self.base_loss - other.base_loss) / larger)
        return sum(parts) / len(parts)


def data_figures(rows: Sequence[Mapping[str, object]], base_loss: float | None) -> DataFigures:
    """Of rows as they are written to files."""
    texts = [" ".join(_texts(row)) for row in rows[:MOST_ROWS]]
    words: Counter[str] = Counter()
    for text in texts:
        words.update(str(zlib.crc32(word.encode()) % BUCKETS) for word in WORD.findall(text.lower()))
    lengths = Counter(str(int(math.log2(1 + len(text)))) for text in texts)
    return DataFigures(base_loss, _shares(words), _shares(lengths))


def figures_of_file(text: str, base_loss: float | None) -> DataFigures:
    """Of JSON Lines."""
    rows = [json.loads(line) for line in text.splitlines()[:MOST_ROWS] if line.strip()]
    return data_figures([row for row in rows if isinstance(row, dict)], base_loss)


def _texts(value: object) -> list[str]:
    """What is written in a row, without its keys and roles."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for key, item in value.items() if key != "role" for text in _texts(item)]
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


def _shares(counts: Counter[str]) -> dict[str, float]:
    total = sum(counts.values())
    return {key: count / total for key, count in sorted(counts.items())}


def _divergence(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Jensen-Shannon, in bits: 0 to 1."""
    total = 0.0
    for key in {*one, *other}:
        p, q = one.get(key, 0.0), other.get(key, 0.0)
        middle = (p + q) / 2
        total += sum(share * math.log2(share / middle) for share in (p, q) if share) / 2
    return min(1.0, max(0.0, total))
