"""TRL's collator, with padding that is told from documents, and borders that do not change the shape of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lora2serve.data.rendering import IGNORE


@dataclass
class RowCollator(DataCollatorForLanguageModeling):  # type: ignore[misc]
    """``longest``: tokens of the longest document of all: kernels and graphs are asked for the same in every step.

    Of a padding-free batch ``padding`` counts the tokens behind its documents, which are one document of their own.
    """

    longest: int = 0
    share: tuple[int, int] = (0, 1)  # which of how many processes gets its part of each batch

    def __call__(self, features: Sequence[Mapping[str, object]], return_tensors: str | None = None) -> object:
        """The part of this process; where there are fewer rows than processes, a row to learn nothing from."""
        number, processes = self.share
        if processes == 1:
            return super().__call__(list(features), return_tensors)
        first, end = (len(features) * place // processes for place in (number, number + 1))
        own = list(features[first:end])
        if own:
            return super().__call__(own, return_tensors)
        labels = features[0]["labels"]
        assert isinstance(labels, Sequence)
        batch = super().__call__([{**features[0], "labels": [IGNORE] * len(labels)}], return_tensors)
        return {**batch, "padding": batch.get("padding", 0) + len(labels)}

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
