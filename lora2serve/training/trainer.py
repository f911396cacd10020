"""TRL's trainer with our recipe: the loop, its checkpoints, its log."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lora2serve.artifacts.run import Run
from lora2serve.config.recipe import Recipe
from lora2serve.data.tokenization import Tokens
from lora2serve.errors import TrainError, did_you_mean
from lora2serve.progress import Advance, Progress
from lora2serve.training.model import Device

STATE = "trainer_state.json"  # of a checkpoint, written last


class Log(TrainerCallback):  # type: ignore[misc]
    """Metrics into metrics.jsonl, steps into the bar, checkpoints into words, Ctrl-C into a checkpoint."""

    def __init__(self, path: Path, advance: Advance, progress: Progress) -> None:
        self.path, self.advance, self.progress = path, advance, progress
        self.last: dict[str, tuple[int, float]] = {}  # figure -> step, value
        self.stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After --resume the bar starts where the run is, and steps beyond the checkpoint leave the log."""
        self.advance(state.global_step)
        if self.path.exists():
            lines = [
                line for line in self.path.read_text().splitlines() if json.loads(line)["step"] <= state.global_step
            ]
            self.path.write_text("".join(f"{line}\n" for line in lines))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.advance(1)
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        kept = {
            key: value for key, value in (logs or {}).items() if isinstance(value, int | float) and math.isfinite(value)
        }
        if {"loss", "eval_loss", "train_runtime"} & kept.keys():  # the last one once, at the end
            self.last |= {key: (state.global_step, value) for key, value in kept.items()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **kept}) + "\n")
            self.advance(0, self._figures())

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One line a checkpoint, so that a log file shows that something moves."""
        figures = self._figures(since=state.global_step - args.logging_steps + 1)
        self.progress.note(f"step {state.global_step} of {state.max_steps}: {figures or 'saved'}")

    def _figures(self, since: int = 0) -> str:
        """The last figures, those of a step before ``since`` left out."""
        names = {"loss": "loss", "eval_loss": "eval loss"}
        known = {key: self.last[key] for key in names if key in self.last}
        return ", ".join(f"{names[key]} {value:.4f}" for key, (step, value) in known.items() if step >= since)

    @contextmanager
    def stop_on_interrupt(self) -> Iterator[None]:
        """The first Ctrl-C (or a scheduler's SIGTERM) finishes the step and saves; a second one ends at once."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, frame: Any) -> None:
            self.stopped = True
            restore()

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            restore()


def fit(
    model: Any, tokenizer: Any, rows: Sequence[Tokens], held_out: Sequence[Tokens], recipe: Recipe, run: Run,
    where: Device, *, checkpointing: bool, resume: bool, progress: Progress,
) -> int:  # fmt: skip
    """Train; the number of steps done. KeyboardInterrupt after a checkpoint was saved on Ctrl-C."""
    data = _dataset(rows, recipe)
    total = total_steps(recipe, len(data))
    checkpoint = last_checkpoint(run) if resume else None
    if checkpoint and _step(checkpoint) >= total:  # killed after the last step: the trainer would add another
        _load_state(model, checkpoint, best=_keeps_best(recipe, bool(held_out)))
        return _step(checkpoint)
    learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    progress.note(f"{total} steps on {where.name} in {where.dtype}; {learned:,} parameters to learn")
    with progress.track("train", total, "steps") as advance:
        log = Log(run.path / "metrics.jsonl", advance, progress)
        arguments = _arguments(recipe, run, where, total, bool(held_out), checkpointing)
        trainer = _trainer(model, tokenizer, data, held_out, arguments, [log, *_early_stopping(recipe)])
        with log.stop_on_interrupt():
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if log.stopped:
        progress.note(f"saved at step {trainer.state.global_step} of {total}")
        raise KeyboardInterrupt
    return int(trainer.state.global_step)


def _trainer(
    model: Any, tokenizer: Any, data: Any, held_out: Sequence[Tokens], arguments: Any, callbacks: Sequence[Any]
) -> Any:
    """TRL's trainer, with our words instead of its own and an adapter in float32."""
    from transformers import PrinterCallback, ProgressCallback
    from transformers.integrations import TensorBoardCallback
    from trl import SFTTrainer

    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=_dataset(held_out) if held_out else None,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):  # else among the checkpoints, which may be removed
            callback.logging_dir = callback.logging_dir or str(Path(arguments.output_dir).parent / "tensorboard")
    # TRL casts the adapter of a 4-bit model to bfloat16, where late, small updates round to nothing; without
    # AVX512-BF16 it is 25 times as slow on a CPU, too. Autocast computes in the device's type all the same.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def _load_state(model: Any, checkpoint: Path, *, best: bool) -> None:
    """The adapter of a checkpoint into ``model``, or of the best one before it."""
    known = json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("best_model_checkpoint")
    kept = checkpoint.with_name(Path(known).name) if known and best else checkpoint
    model.load_adapter(str(kept), "default", is_trainable=True)


def last_checkpoint(run: Run) -> Path | None:
    """The newest whole checkpoint: the trainer writes its state last, so a kill in between leaves none."""
    whole = [path.parent for path in run.path.glob(f"checkpoints/checkpoint-*/{STATE}") if _is_json(path)]
    return max(whole, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _keeps_best(recipe: Recipe, held_out: bool) -> bool:
    return held_out and (recipe.train.save_best or recipe.train.early_stopping is not None)


def _is_json(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")))
    except ValueError:
        return False


def check_trackers(recipe: Recipe) -> None:
    """TrainError for a tracker that is unknown or not installed."""
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    for name in recipe.train.trackers:
        if name not in known:
            near = did_you_mean(name, known)
            raise TrainError(f"train.trackers: unknown tracker {name!r}{near}", f"known: {', '.join(sorted(known))}")
        if name not in integration_utils.get_available_reporting_integrations():
            raise TrainError(f"train.trackers: {name} is not installed", f"pip install {name.replace('_', '-')}")


def total_steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps in all, for that many (packed) rows."""
    each_epoch = math.ceil(rows / (recipe.train.batch_size * recipe.train.accumulation))
    return recipe.train.steps or max(1, math.ceil(each_epoch * recipe.train.epochs))


def _arguments(recipe: Recipe, run: Run, where: Device, total: int, held_out: bool, checkpointing: bool) -> Any:
    from trl import SFTConfig

    train = recipe.train
    try:
        return SFTConfig(
            output_dir=str(run.path / "checkpoints"),
            max_steps=total,
            per_device_train_batch_size=train.batch_size,
            per_device_eval_batch_size=train.batch_size,
            gradient_accumulation_steps=train.accumulation,
            learning_rate=train.learning_rate,
            lr_scheduler_type=train.schedule,
            warmup_steps=math.ceil(train.warmup * total),
            max_grad_norm=train.max_grad_norm,
            weight_decay=train.weight_decay,
            optim="paged_adamw_32bit" if where.on_gpu and train.quantize != "none" else "adamw_torch",
            bf16=where.dtype == "bfloat16",
            fp16=where.dtype == "float16",
            use_cpu=not where.on_gpu,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
            seed=train.seed,
            data_seed=train.seed,
            logging_steps=train.log_interval,
            **_evaluations(recipe, total, held_out),
            report_to=list(train.trackers) or "none",
            run_name=run.name,
            padding_free=recipe.data.packing,  # rows are cut and packed before; each keeps its own positions
            max_length=None,
            disable_tqdm=True,
            dataloader_pin_memory=where.on_gpu,
        )
    except (ValueError, ImportError) as error:
        raise TrainError(f"recipe: {(str(error).splitlines() or ['?'])[0]}") from error


def _evaluations(recipe: Recipe, total: int, held_out: bool) -> dict[str, Any]:
    """When to evaluate and when to save: at the same steps where the best state is to be kept."""
    train = recipe.train
    each_epoch = max(1, math.ceil(total / max(1.0, train.epochs))) if train.steps is None else total
    eval_steps = min(train.eval_steps or each_epoch, total)
    best = _keeps_best(recipe, held_out)
    return {
        "eval_strategy": "steps" if held_out else "no",
        "eval_steps": eval_steps,
        "save_strategy": "steps",
        "save_steps": eval_steps if best else max(1, min(eval_steps, math.ceil(total / 10))),
        "save_total_limit": 2,
        "load_best_model_at_end": best,
        "metric_for_best_model": "eval_loss" if best else None,
        "greater_is_better": False if best else None,
    }


def _early_stopping(recipe: Recipe) -> list[Any]:
    from transformers import EarlyStoppingCallback

    return [EarlyStoppingCallback(recipe.train.early_stopping)] if recipe.train.early_stopping else []


def _dataset(rows: Sequence[Tokens], packed: Recipe | None = None) -> Any:
    """The trainer's form of the rows; packed where the recipe asks for it, so that the steps can be counted."""
    from datasets import Dataset
    from trl import pack_dataset

    found = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    if packed is None or not packed.data.packing:
        return found
    return pack_dataset(found.shuffle(seed=packed.train.seed), packed.data.max_length, "bfd")
