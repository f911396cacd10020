"""What other libraries call a key of the recipe: each is answered with "did you mean".

A name with a section before it is one in that section only.
"""

from __future__ import annotations

from collections.abc import Mapping

OTHER_NAMES: Mapping[str, str] = {
    name: path
    for path, names in {
        "model.path": "base_model model_name model_name_or_path model_id",
        "data.train": "dataset datasets train_file train_data data_path data.path",
        "data.eval": "eval_file eval_data eval_dataset validation validation_file",
        "data.eval_split": "val_set_size val_size test_size validation_split",
        "data.max_length": "max_seq_length max_seq_len sequence_len seq_length cutoff_len model_max_length",
        "data.packing": "sample_packing pack",
        "data.completion_only": "completion_only_loss assistant_only_loss",
        "train.method": "peft_type peft_method",
        "train.from_adapter": "lora_model_dir adapter_name_or_path resume_from_adapter",
        "train.objective": "rl stage",
        "train.preference": "beta dpo_beta rl_beta pref_beta loss_type pref_loss",
        "train.quantize": "load_in_4bit quantization quantise quant_type bnb_4bit_quant_type",
        "train.double_quant": "double_quantization bnb_4bit_use_double_quant",
        "train.epochs": "num_epochs num_train_epochs",
        "train.steps": "max_steps iters",
        "train.batch_size": "micro_batch_size per_device_train_batch_size train_batch_size",
        "train.accumulation": "gradient_accumulation gradient_accumulation_steps grad_accumulation_steps",
        "train.learning_rate": "lr learning_rate",
        "train.samples": "sample_prompts eval_prompts generation_prompts",
        "train.schedule": "lr_scheduler lr_scheduler_type scheduler",
        "train.warmup": "warmup_ratio",
        "train.max_grad_norm": "gradient_clipping max_grad_norm",
        "train.gradient_checkpointing": "grad_checkpoint gradient_checkpoint",
        "train.early_stopping": "early_stopping_patience",
        "train.save_best": "load_best_model_at_end",
        "train.eval_steps": "steps_per_eval",
        "train.log_interval": "logging_steps steps_per_report",
        "train.trackers": "report_to",
        "train.lora": "lora lora_config peft_config",
        "train.lora.rank": "r lora_r lora_rank",
        "train.lora.alpha": "lora_alpha",
        "train.lora.dropout": "lora_dropout",
        "train.lora.targets": "target_modules lora_target lora_target_modules",
        "train.lora.target_parameters": "target_parameters lora_target_parameters",
        "train.lora.modules_to_save": "lora_modules_to_save additional_target",
        "train.lora.rslora": "use_rslora lora_use_rslora peft_use_rslora",
        "train.lora.dora": "use_dora lora_use_dora peft_use_dora",
        "train.lora.init": "init_lora_weights peft_init_lora_weights",
    }.items()
    for name in names.split()
}
