"""Axolotl's config (its docs/config.qmd and schemas) as a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lora2serve.config.translation.moved_keys import UNKNOWN_KEY, MovedKeys, by_name
from lora2serve.config.translation.shared_keys import (
    EIGHT_BITS,
    NO_REWARDS,
    OFF,
    PREFIXES,
    SEVERAL,
    WHY,
    put_column,
    put_sources,
    translate_loop,
    translate_lora,
    translate_name,
    translate_new_tokens,
    translate_objective,
    translate_share,
    translate_trackers,
)

MOVED = {
    "base_model": "model.path", "revision_of_model": "model.revision", "sequence_len": "data.max_length",
    "sample_packing": "data.packing", "lora_model_dir": "train.from_adapter", "lora_r": "train.lora.rank",
    "lora_alpha": "train.lora.alpha", "lora_dropout": "train.lora.dropout",
    "lora_modules_to_save": "train.lora.modules_to_save",
    "lora_target_parameters": "train.lora.target_parameters", "max_steps": "train.steps", "num_epochs": "train.epochs",
    "micro_batch_size": "train.batch_size",
}  # fmt: skip
DATASETS = {"datasets": "data.train", "pretraining_dataset": "data.train", "test_datasets": "data.eval"}
TEMPLATES = {"chatml": "chatml", "llama3": "llama3", "gemma": "gemma", "phi_3": "phi3"}
PREFERENCES = {
    "dpo": {
        "dpo_beta": "beta", "rl_beta": "beta", "dpo_loss_type": "loss_type", "dpo_use_weighting": "use_weighting",
    },
    "kto": {
        "rl_beta": "beta", "kto_desirable_weight": "desirable_weight", "kto_undesirable_weight": "undesirable_weight",
    },
}  # fmt: skip
OWN_TEMPLATE = "the tokenizer's own template is taken; data.chat_template names a file for a model without one"
# Forms of rows that are read by their columns, whatever the type calls them.
READ_BY_COLUMNS = ("chat_template", "sharegpt", "alpaca", "completion", "alpaca_chat.load_qa", "pretrain")
DATASET_KEYS = (
    "path", "type", "data_files", "ds_type", "name", "split", "revision", "field", "field_messages", "field_system",
    "message_property_mappings", "message_field_role", "message_field_content", "chat_template", "roles_to_train",
    "train_on_eos", "train_on_eot",
)  # fmt: skip
IS_OURS: Mapping[str, object] = {"roles_to_train": ["assistant"], "train_on_eos": "turn", "train_on_eot": "turn"}
OWN: Mapping[str, str] = by_name({
    "read from the model": (
        "model_type tokenizer_type tokenizer_use_fast tokenizer_legacy is_falcon_derived_model is_llama_derived_model "
        "is_mistral_derived_model is_qwen_derived_model base_model_config tokenizer_config model_config_type"
    ),
    "the tokenizer's own are taken": "special_tokens eot_tokens default_system_message chat_template_jinja",
    "what a template ends an answer with is learned, and nothing else": "train_on_eos train_on_eot roles_to_train",
    "the loss takes a tile of logits at a time without it": (
        "plugins cut_cross_entropy liger_fused_linear_cross_entropy chunked_cross_entropy"
    ),
    "decoder layers are compiled on a GPU": (
        "torch_compile torch_compile_backend use_kernels lora_mlp_kernel lora_qkv_kernel lora_o_kernel "
        "lora_embedding_kernel unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm unsloth_rope"
    ),
    NO_REWARDS: (
        "rl_beta dpo_beta dpo_loss_type dpo_use_weighting rpo_alpha orpo_alpha kto_desirable_weight "
        "kto_undesirable_weight cpo_alpha simpo_gamma trl reward_model process_reward_model gkd ebft"
    ),
    "experts are in 4 bits wherever the linear layers are": "quantize_moe_experts",
    "an adapter is trained, and the base stays as it is": "unfrozen_parameters lora_on_cpu merge_lora",
    "a merged LoRA is no start of another": "relora relora_steps relora_prune_ratio jagged_restart_steps",
    "the loss is the cross-entropy of each token": "use_dynamic_finetuning use_eaft eaft_alpha eaft_k",
    "rows are shuffled by train.seed": "shuffle_merged_datasets shuffle_before_merging_datasets curriculum_sampling",
    "a loss that is no number ends a run": "loss_watchdog_threshold loss_watchdog_patience",
    "rows are shown token by token by `lora2serve data`": "debug strict",
    "the base is trained as it stands": "overrides_of_model_config overrides_of_model_kwargs",
    "rows with images are not trained": "processor_type skip_prepare_dataset remove_unused_columns image_size",
})  # fmt: skip
OWN_PREFIXES = {
    **PREFIXES,
    "liger_": "the loss takes a tile of logits at a time without it",
    "dpo_": NO_REWARDS,
    "ebft": NO_REWARDS,
    "wandb_": "wandb's own environment variables say it",
    "mlflow_": "mlflow's own environment variables say it",
    "relora": "a merged LoRA is no start of another",
    "use_scattermoe": "decoder layers are compiled on a GPU",
    "use_sonicmoe": "decoder layers are compiled on a GPU",
}


def from_axolotl(config: Mapping[str, object]) -> MovedKeys:
    """Every key moved or left out."""
    keys = MovedKeys(config)
    keys.move(MOVED)
    _data(keys)
    _adapter(keys)
    _batch(keys)
    translate_objective(keys, "rl", PREFERENCES)
    translate_loop(keys, "lr_scheduler")
    names = {"rslora": "peft_use_rslora", "dora": "peft_use_dora", "init": "peft_init_lora_weights"}
    translate_lora(keys, names)
    translate_new_tokens(keys, ["tokens"], "lora_modules_to_save")
    translate_trackers(keys)
    translate_name(keys)
    for path, value in (("train.max_grad_norm", 1.0), ("data.max_length", 512)):
        keys.put_default(path, value)
    keys.drop_off((*OFF, *(OWN.keys() - {"shuffle_merged_datasets"})))
    keys.leave_known({**WHY, **OWN, "tensor_parallel": SEVERAL})
    keys.leave_rest(OWN_PREFIXES)
    return keys


def _adapter(keys: MovedKeys) -> None:
    kind, four, eight = keys.take("adapter"), keys.take("load_in_4bit"), keys.take("load_in_8bit")
    if kind is None:
        keys.leave("adapter", None, "all weights are trained there; a LoRA is trained here")
    elif kind == "ia3":
        keys.put("train.method", kind, "adapter")
    elif kind not in ("lora", "qlora"):
        keys.leave("adapter", kind, "a LoRA is written; train.method names other kinds of adapters")
    if eight:
        keys.leave("load_in_8bit", eight, EIGHT_BITS)
    keys.put("train.quantize", "nf4" if kind == "qlora" or four else "none", "load_in_4bit")
    _targets(keys)
    for key in ("bnb_config_kwargs", "peft"):
        options = keys.take_of(key, dict, "keys and values")
        for name, value in options.items() if isinstance(options, dict) else ():
            if name == "bnb_4bit_use_double_quant":
                keys.put("train.double_quant", value, f"{key}.{name}")
            elif (name, value) not in (("bnb_4bit_quant_type", "nf4"), ("llm_int8_has_fp16_weight", False)):
                keys.leave(f"{key}.{name}", value, UNKNOWN_KEY)


def _targets(keys: MovedKeys) -> None:
    linear, named = keys.take("lora_target_linear"), keys.take("lora_target_modules")
    if linear:
        keys.put("train.lora.targets", "all-linear", "lora_target_linear")
        if named:
            keys.leave("lora_target_modules", named, "lora_target_linear names every linear layer already")
    elif isinstance(named, str) and named != "all-linear" and not re.fullmatch(r"[\w.]+", named):
        keys.leave("lora_target_modules", named, "train.lora.targets lists names of modules, and no pattern")
    elif named:
        keys.put("train.lora.targets", [named] if isinstance(named, str) and named != "all-linear" else named,
                 "lora_target_modules")  # fmt: skip


def _batch(keys: MovedKeys) -> None:
    """``batch_size`` is that of a step there."""
    rows, at_once = keys.take("batch_size"), keys.get("train.batch_size")
    if isinstance(rows, int) and isinstance(at_once, int) and at_once and rows % at_once == 0:
        keys.put("train.accumulation", rows // at_once, "batch_size")
    elif rows is not None:
        keys.leave("batch_size", rows, "rows of a step are train.batch_size times train.accumulation")


def _data(keys: MovedKeys) -> None:
    inputs = keys.take("train_on_inputs")
    if inputs:
        keys.put("data.completion_only", False, "train_on_inputs")
    _template(keys)
    translate_share(keys, "val_set_size")
    for key, path in DATASETS.items():
        sets = keys.take(key)
        sources: list[object] = []
        for number, item in enumerate(sets if isinstance(sets, list) else [sets] if sets else []):
            values = {"path": item} if isinstance(item, str) else item
            if isinstance(values, dict):
                sources += _sources(keys, f"{key}[{number}]", values)
            else:
                keys.leave(f"{key}[{number}]", item, "expected a path and a type")
        put_sources(keys, path, sources, key)


def _template(keys: MovedKeys) -> None:
    template = keys.take("chat_template")
    if isinstance(template, str) and template in TEMPLATES:
        keys.put("data.chat_template", TEMPLATES[template], "chat_template")
    elif template not in (None, "tokenizer_default"):
        keys.leave("chat_template", template, OWN_TEMPLATE)


def _sources(keys: MovedKeys, key: str, item: Mapping[str, object]) -> list[object]:
    """One data set as sources of a recipe: one for each of its files."""
    values = {name: value for name, value in item.items() if value not in (None, "", [], {})}
    files = values.get("data_files") or values.get("path")
    paths = list(files) if isinstance(files, list) else [files]
    place = {"split": values.get("split"), "subset": values.get("name")}
    place = {name: value for name, value in place.items() if value and value != "train"}
    if isinstance(place.get("split"), str) and "[" in str(place["split"]):
        keys.leave(f"{key}.split", place.pop("split"), "data.split names a split, and no part of one")
    revision = values.get("revision")
    sources: list[object] = []
    for path in paths:
        if not isinstance(path, str):
            keys.leave(
                f"{key}.{'data_files' if values.get('data_files') else 'path'}", path, "expected a file or a Hub id"
            )
            continue
        name = f"{path}@{revision}" if revision else path
        sources.append({"path": name, **place} if place else name)
    _columns(keys, key, values)
    _type(keys, key, values.get("type"))
    for name, expected in IS_OURS.items():
        if name in values and values[name] != expected:
            keys.leave(f"{key}.{name}", values[name], OWN["train_on_eos"])
    if "chat_template" in values and values["chat_template"] != "tokenizer_default":
        keys.leave(f"{key}.chat_template", values["chat_template"], OWN_TEMPLATE)
    for name, value in values.items():
        if name not in DATASET_KEYS:
            keys.leave(f"{key}.{name}", value, UNKNOWN_KEY)
    return sources


def _type(keys: MovedKeys, key: str, kind: object) -> None:
    """The form of the rows, which is read off their columns."""
    if isinstance(kind, dict):
        for name, column in (("field_instruction", "instruction"), ("field_input", "input"),
                             ("field_output", "output"), ("field_system", "system")):  # fmt: skip
            put_column(keys, column, kind.get(name) or None, f"{key}.type.{name}")
        read = ("field_instruction", "field_input", "field_output", "field_system", "field")
        for name, value in kind.items():
            if value and name not in read:
                keys.leave(f"{key}.type.{name}", value, "prompts are written by the chat template")
        put_column(keys, "text", kind.get("field") or None, f"{key}.type.field")
    elif isinstance(kind, str) and kind.partition(":")[0] not in READ_BY_COLUMNS:
        keys.leave(f"{key}.type", kind, "rows are read by the names of their columns; data.columns gives others")


def _columns(keys: MovedKeys, key: str, values: Mapping[str, object]) -> None:
    """Other names of keys; ``conversations`` of ``from`` and ``value`` need none."""
    mapping = values.get("message_property_mappings")
    turns = dict(mapping) if isinstance(mapping, dict) else {}
    turns = {"role": values.get("message_field_role"), "content": values.get("message_field_content"), **turns}
    named = {"messages": values.get("field_messages"), "text": values.get("field"), **turns}
    if named["messages"] == "conversations" and turns["role"] in (None, "from") and turns["content"] in (None, "value"):
        named |= {"messages": None, "role": None, "content": None}
    if values.get("field_system") not in (None, "system"):
        named["system"] = values["field_system"]
    for column, name in named.items():
        put_column(keys, column, name, key)
