"""Loss and perplexity of a model on held-out rows, token by token the same for every model compared."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora2serve.artifacts.run_record import EvalLoss
from lora2serve.data.tokenization import IGNORE, Tokens
from lora2serve.progress import Progress
from lora2serve.training.model import Device


def evaluate(model: Any, rows: Sequence[Tokens], pad: int, batch: int, progress: Progress, label: str) -> EvalLoss:
    """Mean negative log-likelihood over every labelled token."""
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
            wanted = labels[:, 1:].to(device)
            kept = wanted != IGNORE  # float32 logits of these only: the vocabulary is large
            told = logits[:, :-1][kept].float()
            total += float(torch.nn.functional.cross_entropy(told, wanted[kept], reduction="sum"))
            count += int(kept.sum())
            advance(len(part))
    model.train(was_training)
    loss_each = total / max(1, count)
    return EvalLoss(eval_loss=loss_each, perplexity=math.exp(min(loss_each, 700.0)), tokens=count)


def pad_batch(rows: Sequence[Tokens], pad: int) -> tuple[Any, Any, Any]:
    """(batch, longest) ids, attention mask and labels, padded on the right."""
    import torch

    longest = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORE)
    for n, row in enumerate(rows):
        ids[n, : len(row.input_ids)] = torch.tensor(row.input_ids)
        mask[n, : len(row.input_ids)] = 1
        labels[n, : len(row.labels)] = torch.tensor(row.labels)
    return ids, mask, labels


def on_original(
    base: Path, adapter: Path, rows: Sequence[Tokens], pad: int, batch: int, where: Device, progress: Progress
) -> EvalLoss | None:
    """The adapter on the full-precision base, or None where that does not fit into memory."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    needed = sum(path.stat().st_size for path in base.glob("*.safetensors")) * (2 if where.dtype == "float32" else 1)
    if needed * 1.2 > _free_memory(where):
        progress.note(
            f"the full-precision base ({needed / 1e9:.1f} GB) does not fit: the adapter was not measured on it"
        )
        return None
    given = {"device_map": {"": 0}} if where.on_gpu else {}
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=getattr(torch, where.dtype), **given)
    return evaluate(
        PeftModel.from_pretrained(model, str(adapter)), rows, pad, batch, progress, "eval on the original base"
    )


def _free_memory(where: Device) -> float:
    """Bytes, once the training's leftovers are given back: its model is full of cycles, CUDA's blocks are cached."""
    import torch

    gc.collect()
    if where.on_gpu:
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info()[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return math.inf
