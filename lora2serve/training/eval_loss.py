"""Loss and perplexity of a model on held-out rows, token by token the same for every model compared."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.artifacts.run_record import EvalLoss
from lora2serve.data.rendering import IGNORE
from lora2serve.data.tokenization import Sample
from lora2serve.progress import Progress
from lora2serve.training.model import Device

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel


def evaluate(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[Sample],
    pad: int | None,
    batch: int,
    progress: Progress,
    label: str,
) -> EvalLoss:
    """Mean negative log-likelihood over every labeled token of ``rows``, ``batch`` rows at a time."""
    import torch

    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad(), progress.track(label, len(rows)) as advance:
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            ids, mask, labels = pad_batch(part, pad)
            device = next(model.parameters()).device
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            targets = labels[:, 1:].to(device)
            labeled = targets != IGNORE  # float32 logits of these only: the vocabulary is large
            predicted = logits[:, :-1][labeled].float()
            total += float(torch.nn.functional.cross_entropy(predicted, targets[labeled], reduction="sum"))
            count += int(labeled.sum())
            advance(len(part))
    model.train(was_training)
    mean = total / max(1, count)
    return EvalLoss(eval_loss=mean, perplexity=math.exp(min(mean, 700.0)), tokens=count)


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
    base: Path, adapter: Path, rows: Sequence[Sample], pad: int | None, batch: int, device: Device, progress: Progress
) -> EvalLoss | None:
    """The adapter on the full-precision base, or None where that does not fit into memory."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    needed = sum(path.stat().st_size for path in base.glob("*.safetensors")) * (2 if device.dtype == "float32" else 1)
    if needed * 1.2 > _free_memory(device):
        progress.note(
            f"the full-precision base ({needed / 1e9:.1f} GB) does not fit: the adapter was not measured on it"
        )
        return None
    placement = {"device_map": {"": 0}} if device.on_gpu else {}
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=getattr(torch, device.dtype), **placement)
    return evaluate(
        PeftModel.from_pretrained(model, str(adapter)), rows, pad, batch, progress, "eval on the original base"
    )


def _free_memory(device: Device) -> float:
    """Bytes, once the training's leftovers are given back: its model is full of cycles, CUDA's blocks are cached."""
    import torch

    gc.collect()
    if device.on_gpu:
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info()[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return math.inf
