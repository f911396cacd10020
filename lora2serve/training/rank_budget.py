"""AdaLoRA's ranks, which it deals out anew while it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import TrainerCallback

from lora2serve.errors import TrainError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainerControl, TrainerState, TrainingArguments


def rank_budget(model: PeftModel, steps: int) -> list[TrainerCallback]:
    """What calls AdaLoRA after each of ``steps``; nothing for any other method."""
    config = model.peft_config["default"]
    if config.peft_type != "ADALORA":
        return []
    if config.tinit + config.tfinal >= steps:
        raise TrainError(
            f"train.options: tinit {config.tinit} and tfinal {config.tfinal}, expected fewer than the {steps} steps",
            "between them AdaLoRA lowers its ranks: lower both, or train longer",
        )
    config.total_step = steps
    return [_RankBudget()]


class _RankBudget(TrainerCallback):  # type: ignore[misc]
    """Between the optimizer's step and the end of its gradients, by which AdaLoRA judges."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: PeftModel, **_: object
    ) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)
