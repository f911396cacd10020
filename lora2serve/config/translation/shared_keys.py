"""What both trainers have from transformers and PEFT, under one name each: schedules, steps, types, trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora2serve.config.lora_inits import is_trainable
from lora2serve.config.model_name import run_name_problem
from lora2serve.config.translation.moved_keys import NAMES, MovedKeys, by_name

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
SAME_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf")
TRACKERS = {
    "wandb_project": "wandb", "use_wandb": "wandb", "wandb_entity": "wandb", "wandb_name": "wandb",
    "mlflow_tracking_uri": "mlflow", "use_mlflow": "mlflow", "mlflow_experiment_name": "mlflow",
    "use_tensorboard": "tensorboard", "use_swanlab": "swanlab", "use_comet": "comet_ml",
}  # fmt: skip
SEVERAL = "`lora2serve train --gpus all` (or torchrun) trains by several; train.parallel: fsdp cuts the base into parts"
NO_REWARDS = "answers and preferences (dpo, kto) are trained, and no rewards"
EIGHT_BITS = "4 bits or none are trained: 16 are written, and nf4 takes less memory"
EVERY_EPOCH = "evaluated at the end of each epoch; train.eval_steps counts steps"

MOVED = {
    "learning_rate": "train.learning_rate", "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm", "gradient_accumulation_steps": "train.accumulation", "seed": "train.seed",
    "early_stopping_patience": "train.early_stopping", "load_best_model_at_end": "train.save_best",
}  # fmt: skip
WHY: Mapping[str, str] = by_name({
    SEVERAL: (
        "deepspeed fsdp fsdp_config fsdp_version fsdp_final_state_dict_type ddp ddp_timeout ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_find_unused_parameters accelerator_config dp_shard_size dp_replicate_size "
        "tensor_parallel_size context_parallel_size sequence_parallel_degree ray_num_workers ray_run_name "
        "ray_storage_path resources_per_worker placement_strategy expert_parallel_size"
    ),
    "the type follows from the GPU: bfloat16, else float16, else float32": (
        "bf16 fp16 tf32 bfloat16 float16 pure_bf16 bf16_full_eval half_precision_backend"
    ),
    "chosen from the model and the GPU": (
        "flash_attention flash_attn sdp_attention xformers_attention attn_implementation eager_attention"
    ),
    "checkpoints are saved ten times a run at least, and --resume finds the last": (
        "save_steps save_strategy saves_per_epoch save_total_limit save_safetensors save_only_model save_first_step "
        "resume_from_checkpoint auto_resume_from_checkpoints overwrite_output_dir"
    ),
    "rows are tokenized in as many processes as it takes, and kept in the cache": (
        "dataset_prepared_path dataset_processes preprocessing_num_workers overwrite_cache dataloader_num_workers "
        "dataset_num_proc dataloader_prefetch_factor dataloader_pin_memory preprocessing_batch_size tokenized_path"
    ),
    "not here: the code of a model is never run": "trust_remote_code trust_remote_code_dataset",
    "padding is left out of the model where it can be": (
        "pad_to_sequence_len group_by_length eval_sample_packing multipack_real_batches sample_packing_eff_est"
    ),
    "evaluated with the rows of a step": "eval_batch_size per_device_eval_batch_size",
    "checkpointing is never reentrant": "gradient_checkpointing_kwargs",
    "`lora2serve push` does it": (
        "hub_model_id hub_strategy push_to_hub push_dataset_to_hub export_hub_model_id hf_use_auth_token"
    ),
    "the picture loss.png is always made": "plot_loss include_num_input_tokens_seen include_tokens_per_second",
    "AdamW has its usual betas (0.9 and 0.999) and epsilon (1e-8)": "adam_beta1 adam_beta2 adam_epsilon",
    "no noise is put on embeddings": "neftune_noise_alpha",
    "A and B learn at one rate": "loraplus_lr_ratio loraplus_lr_embedding",
    "the form of a schedule is fixed": (
        "lr_scheduler_kwargs cosine_min_lr_ratio cosine_constant_lr_ratio lr_scheduler_args"
    ),
    "a recipe names its rows by files: make a smaller one": "max_samples max_eval_samples",
})  # fmt: skip
OFF = (
    "load_in_8bit", "load_in_4bit", "group_by_length", "tf32", "fp16", "bf16", "trust_remote_code", "gptq",
    "eval_sample_packing", "pad_to_sequence_len", "flash_attention", "xformers_attention", "sdp_attention",
    "do_eval", "do_predict", "push_to_hub", "strict", "overwrite_cache", "include_num_input_tokens_seen",
    "include_tokens_per_second", "load_best_model_at_end", "early_stopping_patience", "lora_fan_in_fan_out",
    "overwrite_output_dir", "save_only_model", "save_first_step", "predict_with_generate", "wandb_watch",
)  # fmt: skip
PREFIXES = {
    "fsdp": SEVERAL, "deepspeed": SEVERAL, "ddp_": SEVERAL, "ray_": SEVERAL,
    "save_": "checkpoints are saved ten times a run at least, and --resume finds the last",
    "dataloader_": "rows are tokenized in as many processes as it takes, and kept in the cache",
}  # fmt: skip
TABLES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")  # of embedding and head


def translate_loop(keys: MovedKeys, schedule: str) -> None:
    """Rates, steps, schedule, optimizer and evaluations; ``schedule`` is the trainer's key of that."""
    keys.move(MOVED)
    name = keys.take(schedule)
    if name in SCHEDULES:
        keys.put("train.schedule", name, schedule)
    elif name is not None:
        keys.leave(schedule, name, f"expected one of {', '.join(SCHEDULES)}")
    for key in ("optimizer", "optim"):
        optimizer = keys.take(key)
        if isinstance(optimizer, str) and optimizer not in SAME_ADAMW:
            is_adamw = optimizer.removeprefix("paged_").startswith("adamw")
            why = "AdamW, fused or paged as memory allows" if is_adamw else "AdamW is the only optimizer"
            keys.leave(key, optimizer, why)
    checkpointing = keys.take("gradient_checkpointing")
    if checkpointing is not None:
        keys.put("train.gradient_checkpointing", bool(checkpointing), "gradient_checkpointing")
    if isinstance(checkpointing, str):
        keys.leave("gradient_checkpointing", checkpointing, "true is written: activations stay on the GPU")
    _warmup(keys)
    _evaluations(keys)


def translate_lora(keys: MovedKeys, names: Mapping[str, str]) -> None:
    """What PEFT takes; ``names`` are the trainer's keys: of ``rslora``, ``dora``, ``init``."""
    for field in ("rslora", "dora"):
        if keys.take(names[field]):
            keys.put(f"train.lora.{field}", True, names[field])
    init = keys.take(names["init"])
    if isinstance(init, str) and is_trainable(init):
        keys.put("train.lora.init", init, names["init"])
    elif init not in (None, True):
        keys.leave(names["init"], init, "A begins at random and B at zero (train.lora.init: default)")


def translate_objective(keys: MovedKeys, objective: str, options: Mapping[str, Mapping[str, str]]) -> None:
    """Preferences; ``objective`` is the trainer's key, ``options`` its keys of each and TRL's names of them."""
    value = keys.take(objective)
    if isinstance(value, str) and value in options:
        keys.put("train.objective", value, objective)
        keys.move({key: f"train.preference.{name}" for key, name in options[value].items()})
    elif value is not None:
        keys.leave(objective, value, NO_REWARDS)


def translate_share(keys: MovedKeys, key: str) -> None:
    """The rows that are held out; ``key`` is the trainer's."""
    share = keys.take(key)
    if isinstance(share, int | float) and share >= 1:
        keys.leave(key, share, "data.eval_split is a share of the rows, and this is a number of them")
    elif share:
        keys.put("data.eval_split", share, key)


def translate_new_tokens(keys: MovedKeys, names: Sequence[str], saved: str) -> None:
    """Tokens that are added there, by a list or with commas between; ``saved`` names modules that are trained in full.

    There all rows of the embedding and of the head are trained for them, here those of the tokens are.
    """
    for name in names:
        tokens, before = keys.take_of(name, (str, list), NAMES), keys.get("data.new_tokens") or []
        assert isinstance(before, list)
        if isinstance(tokens, str):
            tokens = [token.strip() for token in tokens.split(",") if token.strip()]
        if isinstance(tokens, list):
            keys.put("data.new_tokens", [*before, *tokens], names[0])
    modules = keys.get("train.lora.modules_to_save")
    if keys.get("data.new_tokens") and isinstance(modules, list):
        tables = [module for module in modules if str(module).rpartition(".")[2] in TABLES]
        keys.put("train.lora.modules_to_save", [module for module in modules if module not in tables], saved)
        if tables:
            keys.leave(saved, tables, "of these tables the rows of data.new_tokens are trained, and no others")


def put_sources(keys: MovedKeys, path: str, sources: Sequence[object], key: str) -> None:
    """Data sets as ``data.train`` or ``data.eval``: a single path as it is."""
    if sources:
        keys.put(path, sources[0] if len(sources) == 1 and isinstance(sources[0], str) else sources, key)


def put_column(keys: MovedKeys, column: str, name: object, key: str) -> None:
    """What the data set ``key`` calls a column, if it does: the first set that says it is followed."""
    if name in (None, column):
        return
    if keys.get(f"data.columns.{column}") not in (None, name):
        keys.leave(f"{key}: {column}", name, "all data sets of a recipe have the same names of columns")
    else:
        keys.put(f"data.columns.{column}", name, key)


def translate_trackers(keys: MovedKeys) -> None:
    """Where figures go beside metrics.jsonl."""
    trackers = keys.take_of("report_to", (str, list), NAMES)
    found = [trackers] if isinstance(trackers, str) else list(trackers) if isinstance(trackers, list) else []
    found = [name for name in found if name != "none"]
    for key, tracker in TRACKERS.items():
        value = keys.take(key)
        if value and tracker not in found:
            found.append(tracker)
        if isinstance(value, str):
            keys.leave(key, value, f"train.trackers has {tracker}: its own environment variables say where to")
    if found:
        keys.put("train.trackers", found, "report_to")


def translate_name(keys: MovedKeys) -> None:
    """The run's name: the last part of the directory that the trainer would write into."""
    directory = keys.take("output_dir")
    name = str(directory).rstrip("/").rpartition("/")[2]
    if directory is not None and keys.get("name") is None and not run_name_problem(name):
        keys.put("name", name, "output_dir")
    elif directory is not None:
        keys.leave("output_dir", directory, "a run is a directory below runs/")


def _warmup(keys: MovedKeys) -> None:
    """A share of the steps; a number of them is one where the steps are counted."""
    steps = keys.take_of("warmup_steps", (int, float), "a number")
    share, total = keys.take("warmup_ratio"), keys.get("train.steps")
    if share is not None:
        keys.put("train.warmup", share, "warmup_ratio")
    if not isinstance(steps, int | float) or (steps == 0 and share is not None):  # 0 leaves it to the share
        return
    if steps < 1:  # transformers takes a share there, too
        keys.put("train.warmup", float(steps), "warmup_steps")
    elif isinstance(total, int) and total >= steps:
        keys.put("train.warmup", steps / total, "warmup_steps")
    else:
        why = "train.warmup is a share of the steps, and how many they are is not known before the rows are read"
        keys.leave("warmup_steps", steps, why)


def _evaluations(keys: MovedKeys) -> None:
    for key in ("eval_strategy", "evaluation_strategy"):
        strategy = keys.take(key)
        if strategy not in (None, "steps", "epoch"):
            keys.leave(key, strategy, EVERY_EPOCH)
    steps, times = keys.take("eval_steps"), keys.take("evals_per_epoch")
    if isinstance(steps, float) and not steps.is_integer():
        keys.leave("eval_steps", steps, "train.eval_steps is a number of steps, and this is a share of them")
    elif steps is not None:
        keys.put("train.eval_steps", steps, "eval_steps")
    if times not in (None, 1):
        keys.leave("evals_per_epoch", times, EVERY_EPOCH)
    interval = keys.take("logging_steps")
    if isinstance(interval, float) and not interval.is_integer():
        keys.leave("logging_steps", interval, "train.log_interval is a number of steps, and this is a share of them")
    elif interval is not None:
        keys.put("train.log_interval", int(interval) if isinstance(interval, float) else interval, "logging_steps")
