"""TRL's trainers where ours differ: evaluation by tokens, steps that fit, and tokens counted on after a resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import speed_metrics
from trl import SFTTrainer

from lora2serve.artifacts.run_record import EvalLoss
from lora2serve.data.rendering import IGNORE
from lora2serve.training.batch_parts import Batch
from lora2serve.training.rank_budget import all_ranks, keep_ranks, restore_ranks
from lora2serve.training.step_attempts import StepAttempts

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import TrainerControl

Measure = Callable[[], EvalLoss]
Figures = tuple[int, dict[str, int]]  # tokens that were trained, and how many figures of each kind were noted


class RunSteps(Trainer):  # type: ignore[misc]
    """What stands before a trainer of TRL, whatever is trained; ``_metrics`` and ``_total_train_tokens`` are TRL's."""

    measure: Measure | None = None  # the eval loss of the model as it is now
    attempts: StepAttempts
    fullest: Batch | None = None  # goes through the model once before the first step, and leaves nothing
    control: TrainerControl
    _before: Figures

    def measured(self) -> Mapping[str, float]:
        """The figures of the held-out rows for the model as it is now; ``loss`` decides what is kept."""
        raise NotImplementedError

    def items_of(self, batch: Batch) -> int:
        """What the loss of a batch is a mean over."""
        raise NotImplementedError

    def lengths(self) -> Sequence[int]:
        """Tokens of each training row."""
        raise NotImplementedError

    def evaluate(self, *_: object, metric_key_prefix: str = "eval", **__: object) -> dict[str, float]:
        """The figures of the held-out rows, logged; the trainer's own are means over batches, which rows share."""
        start = time.time()
        self.model.eval()  # by which TRL knows that these are no figures of training
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measured().items()}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(self.eval_dataset))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *_: object, **__: object) -> None:
        """None: TRL's would lie among the checkpoints, and name a model that this is not; `push` writes the card."""

    @property
    def tokens(self) -> int:
        """That were trained."""
        return int(self._total_train_tokens)

    def count_from(self, tokens: int) -> None:
        """Count on from the tokens that were trained before."""
        self._total_train_tokens = tokens

    def training_step(
        self, model: Module, inputs: Mapping[str, object], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of a batch, whose gradients are added to those of the step's batches before it."""
        if self.fullest is not None:
            self._try_fullest(model, self.fullest)
            self.fullest = None
        if not self.attempts.batches:
            self._before = self._figures()
        loss = self._loss(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.attempts.batches.clear()
        return loss

    def _loss(self, model: Module, inputs: Batch, items: Tensor | int | None) -> Tensor:
        own = super().training_step

        def begin_again() -> None:
            model.zero_grad()
            self._forget(self._before)

        return self.attempts.loss(inputs, lambda part: own(model, part, items), begin_again)

    def _try_fullest(self, model: Module, batch: Batch) -> None:
        """What memory does not hold shows now, and compiled layers are the same whichever batch comes first."""
        self._before = self._figures()
        numbers, on_gpu = torch.get_rng_state(), torch.cuda.is_available()
        of_gpu = torch.cuda.get_rng_state() if on_gpu else None
        self._loss(model, batch, self.items_of(batch))
        model.zero_grad()
        self.attempts.batches.clear()
        self._forget(self._before)
        torch.set_rng_state(numbers)
        if of_gpu is not None:
            torch.cuda.set_rng_state(of_gpu)

    def _figures(self) -> Figures:
        return self._total_train_tokens, {name: len(values) for name, values in self._metrics["train"].items()}

    def _forget(self, before: Figures) -> None:
        """What was counted and noted since."""
        self._total_train_tokens, lengths = before
        for name, values in self._metrics["train"].items():
            del values[lengths.get(name, 0) :]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What --resume and the best state are read from."""
        with all_ranks(self.model):
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        keep_ranks(self.model, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore_ranks(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        restore_ranks(self.model, Path(str(self.state.best_model_checkpoint)))

    def _save_checkpoint(self, model: Module, trial: object) -> None:
        self.state.num_input_tokens_seen = self._total_train_tokens  # else counted for nobody, and zero
        super()._save_checkpoint(model, trial)


class RunTrainer(RunSteps, SFTTrainer):  # type: ignore[misc]
    """Stops and keeps the best state by the eval loss that run.json has at the end: the mean over all tokens."""

    def measured(self) -> Mapping[str, float]:
        """Of all tokens."""
        assert self.measure is not None
        loss = self.measure()
        return {"loss": loss.eval_loss, "tokens": loss.tokens}

    def items_of(self, batch: Batch) -> int:
        """Learned tokens."""
        labels = batch["labels"]
        assert isinstance(labels, Tensor)
        return int((labels != IGNORE).sum())

    def lengths(self) -> Sequence[int]:
        """Of packed rows, too."""
        return [len(ids) for ids in self.train_dataset["input_ids"]]

    def compute_loss(self, model: Module, inputs: dict[str, object], *values: object, **options: object) -> object:
        """TRL's, which counts padding behind documents among the tokens."""
        padding = inputs.pop("padding", 0)
        loss = super().compute_loss(model, inputs, *values, **options)
        if isinstance(padding, int) and self.model.training:
            self._total_train_tokens -= padding
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss
