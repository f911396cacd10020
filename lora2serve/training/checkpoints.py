"""The trainer's checkpoints of a run, for --resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.artifacts.run import CHECKPOINT, TRAINER_STATE, Run

if TYPE_CHECKING:
    from peft import PeftModel


def last_checkpoint(run: Run) -> Path | None:
    """The newest complete checkpoint: the trainer writes its state last, so a kill in between leaves none."""
    complete = [path.parent for path in run.path.glob(CHECKPOINT) if _is_json(path)]
    return max(complete, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that were done when it was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def tokens_of(checkpoint: Path) -> int:
    """The tokens that were trained when it was saved; 0 where an earlier release saved it, which kept no count."""
    return int(json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8")).get("num_input_tokens_seen", 0))


def load_adapter(model: PeftModel, checkpoint: Path, *, best: bool) -> None:
    """The adapter of a checkpoint into ``model``, or of the best one before it."""
    from lora2serve.training.rank_budget import restore_ranks

    path = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8")).get("best_model_checkpoint")
    chosen = checkpoint.with_name(Path(path).name) if path and best else checkpoint
    model.load_adapter(str(chosen), "default", is_trainable=True)
    restore_ranks(model, chosen)


def _is_json(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")))
    except ValueError:
        return False
