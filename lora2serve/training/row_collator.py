"""TRL's collator, with padding that is told from documents, and borders that do not change the shape of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


@dataclass
class RowCollator(DataCollatorForLanguageModeling):  # type: ignore[misc]
    """``longest``: tokens of the longest document of all: kernels and graphs are asked for the same in every step.

    Of a padding-free batch ``padding`` counts the tokens behind its documents, which are one document of their own.
    """

    longest: int = 0

    def torch_call(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, object]:
        """As the trainer wants it."""
        batch: dict[str, object] = super().torch_call(list(examples))
        if not self.padding_free:
            return batch
        tokens = sum(len(example["input_ids"]) for example in examples)
        positions, longest = batch["position_ids"], batch["max_length_q"]
        assert isinstance(positions, Tensor) and isinstance(longest, int)
        padding = positions.size(1) - tokens
        if padding:
            positions[0, tokens:] = torch.arange(padding)
            starts = (positions[0] == 0).nonzero().flatten()
            borders = torch.cat([starts, torch.tensor([tokens + padding])]).to(torch.int32)
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = borders
            documents = torch.arange(len(borders) - 1, dtype=torch.int32)
            batch["seq_idx"] = torch.repeat_interleave(documents, borders.diff())[None]
        longest = max(self.longest, padding, longest)
        return batch | {"max_length_q": longest, "max_length_k": longest, "padding": padding}
