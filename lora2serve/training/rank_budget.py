"""AdaLoRA's ranks, which it deals out anew while it trains, by scores that a checkpoint has to keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from lora2serve.errors import TrainError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainerControl, TrainerState, TrainingArguments


FILE = "rank_budget.pt"  # in a checkpoint
SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def rank_budget(model: PeftModel, steps: int) -> list[TrainerCallback]:
    """What calls AdaLoRA after each of ``steps``; nothing for any other method."""
    config = model.peft_config["default"]
    if not _deals_out(model):
        return []
    if config.tinit + config.tfinal >= steps:
        raise TrainError(
            f"train.options: tinit {config.tinit} and tfinal {config.tfinal}, expected fewer than the {steps} steps",
            "between them AdaLoRA lowers its ranks: lower both, or train longer",
        )
    config.total_step = steps
    return [_RankBudget()]


@contextmanager
def all_ranks(model: PeftModel) -> Iterator[None]:
    """Saved meanwhile, the adapter keeps those that were taken away, too: PEFT cuts them off, and reads none back."""
    if not _deals_out(model):
        yield
        return
    config = model.peft_config["default"]
    dealt, config.rank_pattern = config.rank_pattern, None
    try:
        yield
    finally:
        config.rank_pattern = dealt


def keep_ranks(model: PeftModel, checkpoint: Path) -> None:
    """Which ranks each module has, and the scores by which the next ones are dealt out."""
    import torch

    if _deals_out(model):
        scores = {name: getattr(model.base_model.rankallocator, name) for name in SCORES}
        torch.save({"rank_pattern": model.peft_config["default"].rank_pattern, **scores}, checkpoint / FILE)


def restore_ranks(model: PeftModel, checkpoint: Path) -> None:
    """Those of a checkpoint; an earlier release kept none, and there scores begin anew."""
    import torch

    if _deals_out(model) and (checkpoint / FILE).is_file():
        known = torch.load(checkpoint / FILE, weights_only=True, map_location=model.device)
        model.peft_config["default"].rank_pattern = known["rank_pattern"]
        for name in SCORES:
            setattr(model.base_model.rankallocator, name, known[name])


def _deals_out(model: PeftModel) -> bool:
    return bool(model.peft_config["default"].peft_type == "ADALORA")


class _RankBudget(TrainerCallback):  # type: ignore[misc]
    """Between the optimizer's step and the end of its gradients, by which AdaLoRA judges."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: PeftModel, **_: object
    ) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)
