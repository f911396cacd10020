"""TRL's trainer where ours differs: it evaluates by tokens, and counts the tokens on after a resume."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from transformers.trainer_utils import speed_metrics
from trl import SFTTrainer

from lora2serve.artifacts.run_record import EvalLoss

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import TrainerControl

Measure = Callable[[], EvalLoss]


class RunTrainer(SFTTrainer):  # type: ignore[misc]
    """Stops and keeps the best state by the eval loss that run.json has at the end: the mean over all tokens."""

    measure: Measure | None = None  # the eval loss of the model as it is now
    control: TrainerControl

    def evaluate(self, *_: object, metric_key_prefix: str = "eval", **__: object) -> dict[str, float]:
        """The figures of the held-out rows, logged; the trainer's own are means over batches, which rows share."""
        assert self.measure is not None
        start = time.time()
        self.model.eval()  # by which TRL knows that these are no figures of training
        loss = self.measure()
        metrics = {f"{metric_key_prefix}_loss": loss.eval_loss, f"{metric_key_prefix}_tokens": loss.tokens}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(self.eval_dataset))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *_: object, **__: object) -> None:
        """None: TRL's would lie among the checkpoints, and name a model that this is not; `push` writes the card."""

    def count_from(self, tokens: int) -> None:
        """Count on from the tokens that were trained before."""
        self._total_train_tokens = tokens

    def _save_checkpoint(self, model: Module, trial: object) -> None:
        self.state.num_input_tokens_seen = self._total_train_tokens  # else counted for nobody, and zero
        super()._save_checkpoint(model, trial)
