"""A batch in parts whose losses, and so whose gradients, add up to those of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

Batch = Mapping[str, object]
PAIRS = "completion_mask"  # of a batch whose first half are chosen answers, and whose second half the rejected ones
LABEL = "label"  # of a batch of single answers, whose rows are compared with each other


def units(batch: Batch) -> int:
    """How many parts there can be: rows, pairs of them, or documents of one padding-free row."""
    starts = batch.get("cu_seq_lens_q")
    ids = batch["input_ids"]
    assert isinstance(ids, Tensor)
    if LABEL in batch:
        return 1
    if PAIRS in batch:
        return len(ids) // 2
    return len(starts) - 1 if isinstance(starts, Tensor) else len(ids)


def parts(batch: Batch, count: int) -> Iterator[dict[str, object]]:
    """``batch`` in at most ``count`` parts of about the same number of tokens; for one part, itself."""
    if count == 1:
        yield dict(batch)
        return
    starts = batch.get("cu_seq_lens_q")
    if isinstance(starts, Tensor):
        yield from _documents(batch, starts, count)
        return
    rows = units(batch)
    size = -(-rows // count)
    halves = (0, rows) if PAIRS in batch else (0,)
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        yield {
            name: torch.cat([value[half + start : half + stop] for half in halves])
            if isinstance(value, Tensor) and value.dim()
            else value
            for name, value in batch.items()
        }


def _documents(batch: Batch, starts: Tensor, count: int) -> Iterator[dict[str, object]]:
    """Cut between documents, each part as the collator would have made it."""
    places = [int(place) for place in starts]
    size = places[-1] / count
    first = 0
    while first < len(places) - 1:
        last = first + 1
        while last < len(places) - 1 and places[last + 1] - places[first] <= size:
            last += 1
        yield _cut(batch, starts, first, last)
        first = last


def _cut(batch: Batch, starts: Tensor, first: int, last: int) -> dict[str, object]:
    begin, end = int(starts[first]), int(starts[last])
    part: dict[str, object] = {}
    for name, value in batch.items():
        if name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            part[name] = starts[first : last + 1] - begin
        elif name == "seq_idx" and isinstance(value, Tensor):
            part[name] = value[:, begin:end] - first
        elif isinstance(value, Tensor) and value.dim() == 2:
            part[name] = value[:, begin:end]
        else:
            part[name] = value
    return part
