"""TRL's trainers of preferences on our rows, and with the base as its reference: the adapter, switched off."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from trl import DPOTrainer, KTOTrainer

from lora2serve.artifacts.run_record import PreferenceFigures
from lora2serve.data.preference_pairs import LabeledAnswer, PreferencePair
from lora2serve.data.rows import SIDES
from lora2serve.training.batch_parts import Batch, units
from lora2serve.training.run_trainer import RunSteps

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from torch.nn import Module
    from transformers import PretrainedConfig

OF_PAIRS = ("rewards/margins", "rewards/accuracies")
OF_SIDES = tuple(f"{figure}/{side}" for figure in ("rewards", "logps") for side in SIDES)


class PreferenceTrainer(RunSteps):
    """Stops and keeps the best state by the loss over all held-out rows: what both objectives have in common."""

    loss_is_scaled_for_ga = True  # over all rows of a step, in whatever pieces they go through the model

    def __init__(self, model: PeftModel, **options: object) -> None:
        super().__init__(model=model, ref_model=_NoReference(model.config), **options)
        self.ref_model = None

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        """In token ids already."""
        return dataset

    def weights_of(self, batch: Batch) -> Mapping[str, int]:
        """What each figure of a batch is a mean over."""
        raise NotImplementedError

    def measured(self) -> Mapping[str, float]:
        """Means over all held-out rows, by TRL's loss."""
        sums: defaultdict[str, float] = defaultdict(float)
        counts: Counter[str] = Counter()
        for batch in self.get_eval_dataloader():
            weights = self.weights_of(batch)
            for name, value in self._of_batch(self._prepare_inputs(batch)):
                sums[name] += weights[name] * value
                counts[name] += weights[name]
        found = {name: value / counts[name] for name, value in sums.items() if counts[name]}
        if all(f"rewards/{side}" in found for side in SIDES):
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return {**found, "rows": counts["loss"]}

    def figures(self) -> PreferenceFigures:
        """The same for run.json."""
        self.model.eval()
        found = self.measured()
        return PreferenceFigures(
            loss=found["loss"], margin=found.get("rewards/margins"), accuracy=found.get("rewards/accuracies"),
            chosen=found.get("rewards/chosen"), rejected=found.get("rewards/rejected"), rows=int(found["rows"]),
        )  # fmt: skip

    def _of_batch(self, batch: dict[str, object]) -> Iterator[tuple[str, float]]:
        noted = self._metrics["eval"]
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = super().compute_loss(self.model, batch)
        yield "loss", float(loss)
        yield from ((name, noted[name][-1]) for name in (*OF_PAIRS, *OF_SIDES) if name in noted)
        noted.clear()  # else TRL would log their means over batches, too

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], int]:
        """The batches of a step, and how many rows they have."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(map(self.items_of, batches))

    def compute_loss(
        self, model: Module, inputs: dict[str, object], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:  # fmt: skip
        """TRL's mean over the rows of a batch, as its share of the mean over all rows of the step."""
        loss: Tensor = super().compute_loss(model, inputs)
        return loss if num_items_in_batch is None else loss * (self.items_of(inputs) / num_items_in_batch)


class PairTrainer(PreferenceTrainer, DPOTrainer):  # type: ignore[misc]
    """DPO: two answers to each prompt."""

    def items_of(self, batch: Batch) -> int:
        """Pairs."""
        return units(batch)

    def weights_of(self, batch: Batch) -> Mapping[str, int]:
        """Pairs, whichever figure it is."""
        return dict.fromkeys(("loss", *OF_PAIRS, *OF_SIDES), units(batch))

    def lengths(self) -> Sequence[int]:
        """Of the longer answer with its prompt."""
        keys = ("prompt_ids", "chosen_ids", "rejected_ids")
        return [PreferencePair(*(row[key] for key in keys)).length for row in self.train_dataset]


class LabelTrainer(PreferenceTrainer, KTOTrainer):  # type: ignore[misc]
    """KTO: one answer to each prompt, and whether it is one to give."""

    def items_of(self, batch: Batch) -> int:
        """Rows."""
        return len(_labels(batch))

    def weights_of(self, batch: Batch) -> Mapping[str, int]:
        """Rows, or those with the label; a margin is between both, and none of a batch."""
        right = int(_labels(batch).sum())
        counts = {"chosen": right, "rejected": self.items_of(batch) - right}
        sides = {name: counts[name.rpartition("/")[2]] for name in OF_SIDES}
        return {"loss": self.items_of(batch), **dict.fromkeys(OF_PAIRS, 0), **sides}

    def lengths(self) -> Sequence[int]:
        """Of the longer of both answers that stand behind a prompt."""
        keys = ("prompt_ids", "completion_ids", "KL_completion_ids")
        return [PreferencePair(*(row[key] for key in keys)).length for row in self.train_dataset]


def _labels(batch: Batch) -> Tensor:
    labels = batch["label"]
    assert isinstance(labels, Tensor)
    return labels


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


def label_dataset(answers: Sequence[LabeledAnswer], batch: int, seed: int | None) -> Dataset:
    """The trainer's form of them, shuffled by ``seed``: they stay in that order, since in each batch of so many rows a
    prompt is also asked for the answer of its neighbor, from which KTO estimates how far the model is from the base.
    """
    from datasets import Dataset

    rows = [{"prompt_ids": one.prompt, "completion_ids": one.answer, "label": one.label} for one in answers]
    data = Dataset.from_list(rows)
    data = data if seed is None else data.shuffle(seed=seed)
    own = data["completion_ids"][:]
    parts = [own[start : start + batch] for start in range(0, len(own), batch)]
    return data.add_column("KL_completion_ids", [ids for part in parts for ids in [part[-1], *part[:-1]]])
