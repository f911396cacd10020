"""What is trained: token ids with a label for each; and how many of them are sent between processes, or kept."""

from __future__ import annotations

import json
import sys
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora2serve.config.schema import show
from lora2serve.data.rendering import IGNORE


@dataclass(frozen=True)
class Sample:
    """What is trained at once, in token ids; ``labels`` has ``IGNORE`` where no loss is taken."""

    input_ids: list[int]
    labels: list[int]
    cut: bool  # whether it was longer than max_length
    row: int = 0  # index of its row in the data set; a conversation may give several samples
    right: bool = True  # whether its answer is one to give: neither rejected nor labeled false

    @property
    def learned(self) -> bool:
        """Whether a loss is taken on any token: the first one has nothing before it to be predicted from."""
        return any(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True)
class RowFaults:
    """Rows by their index: cut; with nothing to learn, once cut; with some answers that are not learned."""

    cut: set[int]
    silent: set[int]
    partly: set[int]


def row_faults(samples: Sequence[Sample]) -> RowFaults:
    """Of the rows that ``samples`` are of; a conversation may give several."""
    learned = {sample.row for sample in samples if sample.learned}
    silent = {sample.row for sample in samples if not sample.learned}
    return RowFaults({sample.row for sample in samples if sample.cut}, silent - learned, silent & learned)


@dataclass(frozen=True)
class RowProblemAt:
    """The first row that cannot be rendered: its index, and why."""

    row: int
    message: str
    hint: str


@dataclass
class SampleBatch:
    """The samples of so many consecutive rows; ``losses`` counts those of which the template leaves something out."""

    samples: list[Sample] = field(default_factory=list)
    rows: int = 0
    losses: Counter[str] = field(default_factory=Counter)
    prints_date: bool = False
    problem: RowProblemAt | None = None

    def add(self, other: SampleBatch) -> None:
        """The rows that follow."""
        self.samples += other.samples
        self.rows += other.rows
        self.losses.update(other.losses)
        self.prints_date |= other.prints_date
        self.problem = self.problem or other.problem


def pack(batch: SampleBatch) -> bytes:
    """As bytes: a line of JSON, the token ids as 32-bit integers, and for each a byte: whether it is learned."""
    header = {
        "lengths": [len(sample.input_ids) for sample in batch.samples],
        "rows": [sample.row for sample in batch.samples],
        "count": batch.rows,
        "cut": [number for number, sample in enumerate(batch.samples) if sample.cut],
        "losses": dict(batch.losses),
        "prints_date": batch.prints_date,
        "problem": vars(batch.problem) if batch.problem else None,
    }
    ids, learned = array("i"), bytearray()
    for sample in batch.samples:
        ids.extend(sample.input_ids)
        learned += bytes(label != IGNORE for label in sample.labels)
    return b"".join([json.dumps(header).encode(), b"\n", _little(ids).tobytes(), learned])


def unpack(content: bytes | bytearray) -> SampleBatch:
    """What ``pack`` wrote; ValueError for anything else."""
    line, _, body = bytes(content).partition(b"\n")
    try:
        header = json.loads(line)
        problem = header["problem"]
        return SampleBatch(
            _samples(header["lengths"], header["rows"], set(header["cut"]), body), int(header["count"]),
            Counter(header["losses"]), bool(header["prints_date"]), RowProblemAt(**problem) if problem else None,
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no samples ({show(error)})") from None


def _samples(lengths: list[int], rows: list[int], cut: set[int], body: bytes) -> list[Sample]:
    total = sum(lengths)
    if len(body) != 5 * total or len(rows) != len(lengths) or min(lengths, default=0) < 0:
        raise ValueError("samples of another size than their header says")
    ids = array("i")
    ids.frombytes(body[: 4 * total])
    tokens, start, samples = _little(ids).tolist(), 0, []
    for number, (length, row) in enumerate(zip(lengths, rows, strict=True)):
        part = tokens[start : start + length]
        learned = body[4 * total + start : 4 * total + start + length]
        labels = [token if learn else IGNORE for token, learn in zip(part, learned, strict=True)]
        samples.append(Sample(part, labels, number in cut, row))
        start += length
    return samples


def _little(ids: array[int]) -> array[int]:
    if sys.byteorder == "big":
        ids.byteswap()
    return ids
