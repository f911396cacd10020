"""A trainer made ready for its steps: collator, compiled layers, casts, and what is done where memory is short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from lora2serve.artifacts.run import Run
from lora2serve.artifacts.run_record import LoopRecord
from lora2serve.data.samples import Sample
from lora2serve.progress import Progress
from lora2serve.training import ranks
from lora2serve.training.adapter_casts import AdapterCasts
from lora2serve.training.layer_compilation import MULTIPLE, CompiledLayers
from lora2serve.training.loop_choice import in_parts
from lora2serve.training.model import Device
from lora2serve.training.rank_trainer import RankTrainer
from lora2serve.training.row_collator import RowCollator
from lora2serve.training.run_trainer import RunTrainer
from lora2serve.training.step_attempts import Around, StepAttempts
from lora2serve.training.tiled_head import plain_model
from lora2serve.training.varlen_attention import apart

if TYPE_CHECKING:
    from peft import PeftModel

    from lora2serve.training.run_trainer import RunSteps


def prepare_steps(
    trainer: RunSteps, model: PeftModel, rows: Sequence[Sample], run: Run, loop: LoopRecord, device: Device,
    progress: Progress,
) -> None:  # fmt: skip
    """Let ``trainer`` do its steps as ``loop`` says; run.json has it, and each change that memory makes necessary."""
    inner = plain_model(model)
    tell = partial(ranks.warn_alone, progress)
    run.save(replace(run.record, loop=loop))

    def smaller(count: int) -> None:
        changed = in_parts(loop, count)
        run.save(replace(run.record, loop=changed))
        tell(f"out of memory with {loop.rows} rows at once: {changed.rows} from now on, in the same optimizer steps")

    def recompute() -> None:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        run.save(replace(run.record, loop=replace(run.record.loop or loop, checkpointing=True)))

    around: list[Around] = [apart] if loop.varlen else []
    if device.dtype != "float32":
        around.append(AdapterCasts(model, getattr(torch, device.dtype)).on)
    if isinstance(trainer, RunTrainer):
        trainer.data_collator = RowCollator(
            pad_token_id=trainer.data_collator.pad_token_id,
            padding_free=trainer.padding_free,
            pad_to_multiple_of=MULTIPLE if loop.compiled else None,
            longest=max(len(row.input_ids) for row in rows),
            share=(ranks.rank(), ranks.processes()),
        )
    trainer.attempts = StepAttempts(
        told=tell,
        smaller=smaller,
        recompute=None if loop.checkpointing or model.active_peft_config.is_prompt_learning else recompute,
        around=around,
        compiled=CompiledLayers(inner) if loop.compiled else None,
        together=loop.sharded,
    )
    if isinstance(trainer, RankTrainer):
        trainer.begin_together()
    if device.on_gpu or loop.compiled:
        trainer.fullest = _fullest(trainer, loop)


def _fullest(trainer: RunSteps, loop: LoopRecord) -> dict[str, object]:
    """A batch of which every row, packed or not, is the longest."""
    lengths = trainer.lengths()
    example = trainer.train_dataset[lengths.index(max(lengths))]
    batch: dict[str, object] = trainer.data_collator([example] * loop.rows * ranks.processes())
    return batch
