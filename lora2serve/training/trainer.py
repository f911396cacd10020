"""TRL's trainer with our recipe: its arguments, its data, its loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.artifacts.run import Run
from lora2serve.artifacts.run_record import LoopRecord
from lora2serve.config.objectives import SFT, Objective, config_class, read_preference
from lora2serve.config.recipe import Recipe
from lora2serve.data.preference_pairs import labeled, paired
from lora2serve.data.samples import Sample
from lora2serve.data.tokenizer import Tokenizer
from lora2serve.errors import TrainError, did_you_mean
from lora2serve.progress import Progress
from lora2serve.training import ranks
from lora2serve.training.checkpoints import last_checkpoint, load_adapter, step_of, tokens_of
from lora2serve.training.loop_choice import decided, packs, with_compiler
from lora2serve.training.metric_logging import MetricLog
from lora2serve.training.model import Device
from lora2serve.training.pace import Pace
from lora2serve.training.rank_budget import rank_budget
from lora2serve.training.sample_log import SampleLog
from lora2serve.training.sample_prompts import SamplePrompt
from lora2serve.training.schedule import eval_interval, total_steps
from lora2serve.training.shared_base import PassOn
from lora2serve.training.steps import prepare_steps
from lora2serve.training.turns import Turn

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import EarlyStoppingCallback, TrainerCallback
    from trl import DPOConfig, KTOConfig, SFTConfig

    from lora2serve.training.run_trainer import Measure, RunSteps


def fit(
    model: PeftModel, tokenizer: Tokenizer, rows: Sequence[Sample], held_out: Sequence[Sample], recipe: Recipe,
    run: Run, device: Device, loop: LoopRecord, *, resume: bool, measure: Measure, progress: Progress,
    prompts: Sequence[SamplePrompt] = (), turn: Turn | None = None,
) -> int:  # fmt: skip
    """Train; the number of steps done. KeyboardInterrupt after a checkpoint was saved on Ctrl-C.

    measure: the eval loss of ``model`` as it is at that moment, on all of ``held_out``; preferences have another one.
    prompts: what it is asked where it is evaluated, before and after.
    turn: with which others that are trained at the same time are waited for after each step.
    """
    loop = decided(loop, model, rows, recipe, device)
    if recipe.data.packing and not packs(recipe, loop, model, rows, progress):
        recipe = replace(recipe, data=replace(recipe.data, packing=False))
    data = _dataset(rows, recipe)
    total = total_steps(recipe, len(data))
    loop = with_compiler(loop, total, device)
    checkpoint = last_checkpoint(run) if resume else None
    if checkpoint and step_of(checkpoint) >= total:  # killed after the last step: the trainer would add another
        load_adapter(model, checkpoint, best=_keeps_best(recipe, bool(held_out)))
        if recipe.train.objective != SFT:
            arguments = _arguments(recipe, run, device, total, bool(held_out), loop)
            _keep_figures(_trainer(model, tokenizer, data, held_out, arguments, [], recipe), run, progress)
        return step_of(checkpoint)
    learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    progress.note(f"{total} steps on {_place(device)} in {device.dtype}; {learned:,} parameters to learn")
    with progress.track("train", total, "steps") as advance:
        log = MetricLog(run.path / "metrics.jsonl", advance, progress)
        arguments = _arguments(recipe, run, device, total, bool(held_out), loop)
        callbacks = [log, *_early_stopping(recipe), *rank_budget(model, total)]
        callbacks += _samples(recipe, run, total, prompts, tokenizer, progress, sharded=loop.sharded)
        trainer = _trainer(model, tokenizer, data, held_out, arguments, callbacks, recipe)
        prepare_steps(trainer, model, rows, run, loop, device, progress)
        trainer.measure = measure
        trainer.count_from(tokens_of(checkpoint) if checkpoint else 0)
        pace = _with_pace(trainer, model, device, log)
        _take_turns(trainer, turn, log)
        with turn.steps() if turn else log.stop_on_interrupt():
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    run.save(replace(run.record, speed=pace.record()))
    if log.stopped or log.all_stop:
        progress.note(f"saved at step {trainer.state.global_step} of {total}")
        raise KeyboardInterrupt
    _keep_figures(trainer, run, progress)
    return int(trainer.state.global_step)


def _keep_figures(trainer: RunSteps, run: Run, progress: Progress) -> None:
    """Of preferences, how the state that is kept tells held-out answers apart."""
    from lora2serve.training.preference_trainer import PreferenceTrainer

    if not isinstance(trainer, PreferenceTrainer) or trainer.eval_dataset is None:
        return
    found = trainer.figures()
    run.save(replace(run.record, metrics=replace(run.record.metrics, preference=found)))
    progress.note(f"held out: {found.in_words()}")


def _with_pace(trainer: RunSteps, model: PeftModel, device: Device, log: MetricLog) -> Pace:
    """What measures the trainer's steps, shown by its log."""
    pace = Pace(model, device, lambda: trainer.tokens)
    trainer.add_callback(pace)
    log.pace = pace.words
    return pace


def _take_turns(trainer: RunSteps, turn: Turn | None, log: MetricLog) -> None:
    """After all that is done after a step."""
    if turn:
        trainer.add_callback(PassOn(turn, log.stop))


def _samples(
    recipe: Recipe, run: Run, total: int, prompts: Sequence[SamplePrompt], tokenizer: Tokenizer, progress: Progress,
    *, sharded: bool,
) -> list[SampleLog]:  # fmt: skip
    every, path = eval_interval(recipe, total), run.path / "samples.jsonl"
    asks = ranks.rank() == 0 or sharded  # then the others go through the model with it, each into a file of its own
    return [SampleLog(path, prompts, tokenizer, every, progress)] if prompts and asks else []


def _trainer(
    model: PeftModel,
    tokenizer: Tokenizer,
    data: Dataset,
    held_out: Sequence[Sample],
    arguments: SFTConfig | DPOConfig | KTOConfig,
    callbacks: Sequence[TrainerCallback],
    recipe: Recipe,
) -> RunSteps:
    """TRL's trainer, with our words instead of its own and an adapter in float32."""
    from transformers import PrinterCallback, ProgressCallback
    from transformers.integrations import TensorBoardCallback

    arguments._n_gpu = min(1, arguments.n_gpu)  # of several GPUs without a launcher, the first, where the model is
    if not _name_experts(model):
        arguments.router_aux_loss_coef = 0.0
    learned = {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
    trained_before = recipe.train.from_adapter is not None
    in_full = {name: value for name, value in learned.items() if trained_before or ".lora_" not in name}
    trainer = _trainer_class(recipe.train.objective)(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=_dataset(held_out, recipe, held_out=True) if held_out else None,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):  # else among the checkpoints, which may be removed
            callback.logging_dir = callback.logging_dir or str(Path(arguments.output_dir).parent / "tensorboard")
    # TRL casts what is trained of a 4-bit model to bfloat16, where late, small updates round to nothing; without
    # AVX512-BF16 it is 25 times as slow on a CPU, too. Autocast computes in the device's type all the same. Of a LoRA's
    # random start nothing is lost by it, of what comes from the base, or was trained, there would be.
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = in_full.get(name, parameter.data).float()
    return trainer


def _trainer_class(objective: Objective) -> type[RunSteps]:
    from lora2serve.training.preference_trainer import LabelTrainer, PairTrainer
    from lora2serve.training.rank_trainer import RankTrainer
    from lora2serve.training.run_trainer import RunTrainer

    by_tokens = RunTrainer if ranks.processes() == 1 else RankTrainer
    return {"sft": by_tokens, "dpo": PairTrainer, "kto": LabelTrainer}[objective]


def _place(device: Device) -> str:
    return device.name if ranks.processes() == 1 else f"{device.name} by {ranks.processes()} processes"


def _name_experts(model: PeftModel) -> bool:
    """Whether there are experts, whose count TRL reads from a key that the configs of Granite and others call else."""
    config = model.config.get_text_config()
    count = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if count and not hasattr(config, "num_experts"):
        config.num_experts = count
    return bool(count)


def _keeps_best(recipe: Recipe, held_out: bool) -> bool:
    return held_out and (recipe.train.save_best or recipe.train.early_stopping is not None)


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


def _arguments(
    recipe: Recipe, run: Run, device: Device, total: int, held_out: bool, loop: LoopRecord
) -> SFTConfig | DPOConfig | KTOConfig:
    train = recipe.train
    try:
        return config_class(train.objective)(
            output_dir=str(run.path / "checkpoints"),
            max_steps=total,
            per_device_train_batch_size=loop.rows * ranks.processes(),
            per_device_eval_batch_size=train.batch_size,
            gradient_accumulation_steps=loop.accumulation,
            learning_rate=train.learning_rate,
            lr_scheduler_type=train.schedule,
            warmup_steps=math.ceil(train.warmup * total),
            max_grad_norm=train.max_grad_norm,
            weight_decay=train.weight_decay,
            optim=loop.optimizer,
            bf16=device.dtype == "bfloat16",
            fp16=device.dtype == "float16",
            use_cpu=not device.on_gpu,
            gradient_checkpointing=loop.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            seed=train.seed + ranks.rank(),  # of dropout; the order of rows is the same in all processes
            data_seed=train.seed,
            logging_steps=train.log_interval,
            logging_nan_inf_filter=False,  # which would show a mean of others instead
            **_evaluations(recipe, total, held_out),
            report_to=(list(train.trackers) if ranks.rank() == 0 else []) or "none",
            run_name=run.name,
            max_length=None,  # rows are cut and packed before
            **_of_objective(recipe, loop),
            disable_tqdm=True,
            dataloader_pin_memory=device.on_gpu,
        )
    except (ValueError, ImportError) as error:
        raise TrainError(f"recipe: {(str(error).splitlines() or ['?'])[0]}") from error


def _of_objective(recipe: Recipe, loop: LoopRecord) -> dict[str, object]:
    """Arguments that not every trainer has."""
    if recipe.train.objective == SFT:
        return {"padding_free": recipe.data.packing or bool(loop.varlen)}
    return read_preference(recipe.train.objective, recipe.train.preference, [])


def _evaluations(recipe: Recipe, total: int, held_out: bool) -> dict[str, object]:
    """When to evaluate and when to save: at the same steps where the best state is to be kept."""
    eval_steps = eval_interval(recipe, total)
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


def _early_stopping(recipe: Recipe) -> list[EarlyStoppingCallback]:
    from transformers import EarlyStoppingCallback

    return [EarlyStoppingCallback(recipe.train.early_stopping)] if recipe.train.early_stopping else []


def _dataset(rows: Sequence[Sample], recipe: Recipe, *, held_out: bool = False) -> Dataset:
    """The trainer's form of the rows; packed where the recipe asks for it, so that the steps can be counted."""
    from datasets import Dataset
    from trl import pack_dataset

    from lora2serve.training.preference_trainer import label_dataset, pair_dataset

    if recipe.train.objective == "dpo":
        return pair_dataset(paired(rows))
    if recipe.train.objective == "kto":
        return label_dataset(labeled(rows), recipe.train.batch_size, None if held_out else recipe.train.seed)
    data = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    if held_out or not recipe.data.packing:
        return data
    return pack_dataset(data.shuffle(seed=recipe.train.seed), recipe.data.max_length, "bfd")
