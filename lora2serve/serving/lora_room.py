"""Room for adapters in a vLLM: how many and how large, and what that takes.

vLLM allocates every slot when it starts, at ``max_lora_rank``, whatever is loaded into it later: A and B of each linear
layer, of the embeddings and of the head (vllm/lora/layers). What is in no slot waits in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lora2serve.adapters.lint import max_lora_rank
from lora2serve.planning.model_shape import ModelShape

MOST_SLOTS = 16  # each takes memory, and a batch seldom mixes more; others wait for the next one


@dataclass(frozen=True)
class LoraRoom:
    """vLLM's three options, as they are derived; ``slot_bytes`` is None where the base's shape is not known."""

    max_loras: int
    max_cpu_loras: int
    max_lora_rank: int
    slot_bytes: int | None = None

    @property
    def flags(self) -> list[str]:
        """For the command line of vLLM, where the last of two wins."""
        return [
            "--max-loras", str(self.max_loras), "--max-cpu-loras", str(self.max_cpu_loras),
            "--max-lora-rank", str(self.max_lora_rank),
        ]  # fmt: skip


def lora_room(live: int, warm: int, ranks: Iterable[int], base: ModelShape | None, bytes_per_value: int) -> LoraRoom:
    """Room for ``live`` adapters that answer at once, and for ``warm`` ones that are kept loaded, of these ranks."""
    slots, rank = max(1, min(live, MOST_SLOTS)), max_lora_rank(max(ranks, default=1))
    taken = slot_values(base, rank) * bytes_per_value if base else None
    return LoraRoom(slots, max(slots, warm), rank, taken)


def slot_values(base: ModelShape, rank: int) -> int:
    """Values of one slot, without those of experts: A and B of each linear layer, of the embeddings and of the head."""
    pairs = sum(linear.inputs + linear.outputs for linear in base.linears)
    return rank * (pairs + 2 * (base.vocabulary + base.hidden))
