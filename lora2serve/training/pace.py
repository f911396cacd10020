"""Tokens a second, and how much of a GPU that is: beside the bar while it trains, and in run.json."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from lora2serve.artifacts.run_record import SpeedRecord
from lora2serve.training import ranks
from lora2serve.training.model import Device

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import TrainerControl, TrainerState, TrainingArguments

OPERATIONS = 4  # a parameter and token: forward, and the gradients of activations; frozen weights have none
SIZE = 4096  # of the matrices whose product is the limit


class Pace(TrainerCallback):  # type: ignore[misc]
    """Of all steps of this process but the first, which compiles, and tries the fullest batch."""

    def __init__(self, model: Module, device: Device, tokens: Callable[[], int]) -> None:
        self._tokens, self._device = tokens, device
        self._operations = OPERATIONS * sum(map(_values, model.parameters()))
        self._limit = _product_rate(device) if device.on_gpu else None  # operations a second
        self._trained, self._seconds = 0, 0.0
        self._steps = 0
        self._start = (0, 0.0)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """From the fetched batch."""
        self._start = (self._tokens(), time.perf_counter())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """To the updated adapter."""
        self._steps += 1
        if self._steps > 1:
            tokens, started = self._start
            self._trained += self._tokens() - tokens
            self._seconds += time.perf_counter() - started

    def record(self) -> SpeedRecord | None:
        """None before the second step."""
        if not self._seconds:
            return None
        rate = self._trained / self._seconds
        share = rate * self._operations / (self._limit * ranks.processes()) if self._limit else None
        return SpeedRecord(tokens_per_second=round(rate, 1), share_of_limit=share and round(share, 4))

    def words(self) -> str:
        """Beside a bar: empty before the second step."""
        speed = self.record()
        if speed is None:
            return ""
        words = [f"{speed.tokens_per_second:,.0f} tokens/s"]
        if speed.share_of_limit is not None:
            words.append(f"{speed.share_of_limit:.0%} of the GPU")
        if self._device.on_gpu:
            words.append(f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
        return ", ".join(words)


def _values(parameter: torch.Tensor) -> int:
    """Of a packed one as many as it stands for."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()


def _product_rate(device: Device) -> float:
    """Operations a second of a large product in the type that training computes in: what a GPU gives at most."""
    own = torch.Generator("cuda").manual_seed(0)  # the run's numbers stay as they are
    options = {"device": "cuda", "dtype": getattr(torch, device.dtype), "generator": own}
    left, right = (torch.randn(SIZE, SIZE, **options) for _ in range(2))
    rates = []
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        left @ right
        torch.cuda.synchronize()
        rates.append(2 * SIZE**3 / (time.perf_counter() - started))
    return statistics.median(rates)
