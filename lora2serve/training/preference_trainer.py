"""TRL's trainer of preferences on our rows, and with the base as its reference: the adapter, switched off."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from trl import DPOTrainer

from lora2serve.artifacts.run_record import PreferenceFigures
from lora2serve.data.preference_pairs import PreferencePair
from lora2serve.training.batch_parts import Batch, units
from lora2serve.training.run_trainer import RunSteps

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from torch.nn import Module
    from transformers import PretrainedConfig

FIGURES = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
)  # fmt: skip


class PreferenceTrainer(RunSteps, DPOTrainer):  # type: ignore[misc]
    """Stops and keeps the best state by the loss over all held-out pairs."""

    loss_is_scaled_for_ga = True  # over all pairs of a step, in whatever pieces they go through the model

    def __init__(self, model: PeftModel, **options: object) -> None:
        super().__init__(model=model, ref_model=_NoReference(model.config), **options)
        self.ref_model = None

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        """In token ids already."""
        return dataset

    def measured(self) -> Mapping[str, float]:
        """Means over all held-out pairs, by TRL's loss."""
        sums: defaultdict[str, float] = defaultdict(float)
        pairs = 0
        for batch in self.get_eval_dataloader():
            count = units(batch)
            for name, value in self._of_batch(self._prepare_inputs(batch)):
                sums[name] += count * value
            pairs += count
        return {**{name: value / max(1, pairs) for name, value in sums.items()}, "pairs": pairs}

    def figures(self) -> PreferenceFigures:
        """The same for run.json."""
        self.model.eval()
        found = self.measured()
        return PreferenceFigures(
            loss=found["loss"], margin=found["rewards/margins"], accuracy=found["rewards/accuracies"],
            chosen=found["rewards/chosen"], rejected=found["rewards/rejected"], pairs=int(found["pairs"]),
        )  # fmt: skip

    def _of_batch(self, batch: dict[str, object]) -> Iterator[tuple[str, float]]:
        noted = self._metrics["eval"]
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = super().compute_loss(self.model, batch)
        yield "loss", float(loss)
        yield from ((name, noted[name][-1]) for name in FIGURES)
        noted.clear()  # else TRL would log their means over batches, too

    def items_of(self, batch: Batch) -> int:
        """Pairs."""
        return units(batch)

    def lengths(self) -> Sequence[int]:
        """Of the longer answer with its prompt."""
        keys = ("prompt_ids", "chosen_ids", "rejected_ids")
        return [PreferencePair(*(row[key] for key in keys)).length for row in self.train_dataset]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], int]:
        """The batches of a step, and how many pairs they have."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(map(units, batches))

    def compute_loss(
        self, model: Module, inputs: dict[str, object], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:  # fmt: skip
        """TRL's mean over the pairs of a batch, as its share of the mean over all pairs of the step."""
        loss: Tensor = super().compute_loss(model, inputs)
        return loss if num_items_in_batch is None else loss * (units(inputs) / num_items_in_batch)


class _NoReference(torch.nn.Module):
    """Given to TRL in place of a second model: without one it copies the adapter, to compare with its start."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self) -> None:
        """Never called."""


def pair_dataset(pairs: Sequence[PreferencePair]) -> Dataset:
    """The trainer's form of them."""
    from datasets import Dataset

    rows = [{"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected} for pair in pairs]
    return Dataset.from_list(rows)
