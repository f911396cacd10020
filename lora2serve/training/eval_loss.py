"""Loss and perplexity of a model on held-out rows, token by token the same for every model compared."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.adapters.peft_loading import load_adapter
from lora2serve.artifacts.run_record import EvalLoss, LossDifference
from lora2serve.data.rendering import IGNORE
from lora2serve.data.samples import Sample
from lora2serve.progress import Progress
from lora2serve.training import ranks
from lora2serve.training.base_parts import is_sharded
from lora2serve.training.model import Device
from lora2serve.training.new_rows import grow
from lora2serve.training.student_t import student_t
from lora2serve.training.tiled_head import token_losses
from lora2serve.weights.language_model import load_language_model

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel


FEWEST_ROWS = 4  # of which an interval says something


@dataclass(frozen=True)
class RowLosses:
    """Negative log-likelihood of held-out rows, in nats: (rows,) float64 sums, over (rows,) int64 labeled tokens."""

    sums: Tensor
    tokens: Tensor

    def mean(self) -> EvalLoss:
        """The mean over all tokens of all rows."""
        count = int(self.tokens.sum())
        loss = float(self.sums.sum()) / max(1, count)
        return EvalLoss(eval_loss=loss, perplexity=math.exp(min(loss, 700.0)), tokens=count)

    def write(self, path: Path) -> None:
        """A line of JSON for each row, in their order: the sum of its losses, and its labeled tokens."""
        pairs = zip(self.sums.tolist(), self.tokens.tolist(), strict=True)
        path.write_text(
            "".join(f'{{"loss": {loss!r}, "tokens": {tokens}}}\n' for loss, tokens in pairs), encoding="utf-8"
        )

    def less(self, other: RowLosses) -> LossDifference:
        """The mean of these less that of ``other`` over the same rows, and where it lies if rows like them were drawn.

        A row is the unit, as its tokens are not independent: the linearized variance of a ratio of means (Cochran,
        Sampling Techniques, section 6.3), and Student's t.
        """
        rows, tokens = len(self.tokens), max(1, int(self.tokens.sum()))
        apart = self.sums - other.sums
        mean = float(apart.sum()) / tokens
        if rows < FEWEST_ROWS:
            return LossDifference(mean, -math.inf, math.inf, rows)
        squares = float(((apart - mean * self.tokens) ** 2).sum())
        half = student_t(rows - 1) * math.sqrt(rows / (rows - 1) * squares) / tokens
        return LossDifference(mean, mean - half, mean + half, rows)


def evaluate(
    model: PreTrainedModel | PeftModel,
    samples: Sequence[Sample],
    pad: int | None,
    batch: int,
    progress: Progress,
    label: str,
) -> RowLosses:
    """The loss of every labeled token of ``samples``, ``batch`` of them at a time, by the rows that they are of.

    Of several processes each takes a part of the samples, and all get all losses.
    """
    import torch

    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    places = {row: place for place, row in enumerate(dict.fromkeys(sample.row for sample in samples))}
    sums, tokens = torch.zeros(len(places), dtype=torch.float64), torch.zeros(len(places), dtype=torch.int64)
    starts = range(0, len(samples), batch)[ranks.rank() :: ranks.processes()]
    rounds = -(-len(range(0, len(samples), batch)) // ranks.processes())
    with progress.track(label, sum(len(samples[start : start + batch]) for start in starts)) as advance:
        for start in starts:
            part = samples[start : start + batch]
            ids, mask, labels = pad_batch(part, pad)
            losses = token_losses(model, ids.to(device), mask.to(device), labels.to(device))
            row_of_sample = torch.tensor([places[sample.row] for sample in part])
            row_of = row_of_sample[(labels[:, 1:] != IGNORE).nonzero()[:, 0]]  # of each of these tokens
            sums.index_add_(0, row_of, losses.cpu().double())
            tokens.index_add_(0, row_of, torch.ones_like(row_of))
            advance(len(part))
        if is_sharded(model) and len(starts) < rounds:  # the others need this process once more
            token_losses(model, *(tensor.to(device) for tensor in pad_batch(samples[:1], pad)))
    model.train(was_training)
    return RowLosses(ranks.summed(sums), ranks.summed(tokens))


def pad_batch(rows: Sequence[Sample], pad: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, longest) ids, attention mask and labels, padded on the right."""
    import torch

    longest = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), longest), 0 if pad is None else pad)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORE)
    for n, row in enumerate(rows):
        ids[n, : len(row.input_ids)] = torch.tensor(row.input_ids)
        mask[n, : len(row.input_ids)] = 1
        labels[n, : len(row.labels)] = torch.tensor(row.labels)
    return ids, mask, labels


def on_original(
    base: Path, adapter: Path, rows: Sequence[Sample], pad: int | None, batch: int, device: Device, progress: Progress,
    vocabulary: int = 0,
) -> RowLosses | None:  # fmt: skip
    """The adapter on the full-precision base, or None where that does not fit into memory.

    vocabulary: rows that the adapter's tokens need at least.
    """
    import torch

    needed = sum(path.stat().st_size for path in base.glob("*.safetensors")) * (2 if device.dtype == "float32" else 1)
    if not ranks.all_agree(needed * 1.2 <= _free_memory(device)):
        progress.note(
            f"the full-precision base ({needed / 1e9:.1f} GB) does not fit: the adapter was not measured on it"
        )
        return None
    placement = {"device_map": {"": 0}} if device.on_gpu else {}
    model = load_language_model(base, dtype=getattr(torch, device.dtype), **placement)
    grow(model, vocabulary)
    return evaluate(load_adapter(model, adapter), rows, pad, batch, progress, "eval on the original base")


def _free_memory(device: Device) -> float:
    """Bytes, once the training's leftovers are given back: its model is full of cycles, CUDA's blocks are cached."""
    import torch

    gc.collect()
    if device.on_gpu:
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info()[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024 / ranks.local_processes()
    return math.inf
