"""LLaMA-Factory's config (its hparams, and transformers' training arguments) as a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora2serve.config.translation.moved_keys import NAMES, UNKNOWN_KEY, MovedKeys, by_name
from lora2serve.config.translation.shared_keys import (
    EIGHT_BITS,
    NO_REWARDS,
    OFF,
    PREFIXES,
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
from lora2serve.errors import RecipeError

INDEX = "dataset_info.json"
MOVED = {
    "model_name_or_path": "model.path", "model_revision": "model.revision", "cutoff_len": "data.max_length",
    "adapter_name_or_path": "train.from_adapter", "lora_rank": "train.lora.rank", "lora_alpha": "train.lora.alpha",
    "lora_dropout": "train.lora.dropout", "double_quantization": "train.double_quant", "max_steps": "train.steps",
    "num_train_epochs": "train.epochs", "per_device_train_batch_size": "train.batch_size",
}  # fmt: skip
# What transformers and LLaMA-Factory do where nothing is said, and a recipe would not.
DEFAULTS: Mapping[str, object] = {
    "train.learning_rate": 5e-5, "train.schedule": "linear", "train.warmup": 0.0, "train.max_grad_norm": 1.0,
    "train.epochs": 3, "data.max_length": 2048,
}  # fmt: skip
# Their names of columns in dataset_info.json, and ours.
COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "messages": "messages", "system": "system",
    "tools": "tools", "chosen": "chosen", "rejected": "rejected", "kto_tag": "label",
}  # fmt: skip
PREFERENCES = {
    "dpo": {"pref_beta": "beta", "dpo_label_smoothing": "label_smoothing"},
    "kto": {
        "pref_beta": "beta", "kto_chosen_weight": "desirable_weight", "kto_rejected_weight": "undesirable_weight",
    },
}  # fmt: skip
INDEX_KEYS = ("file_name", "hf_hub_url", "columns", "tags", "formatting", "ranking", "split", "subset")
NATIVE = {("messages", "conversations"), ("role", "from"), ("content", "value")}
OWN: Mapping[str, str] = by_name({
    NO_REWARDS: (
        "pref_beta pref_ftx pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight simpo_gamma "
        "ref_model ref_model_adapters reward_model reward_model_adapters reward_model_type ranking"
    ),
    "all rows are shuffled together; data.train takes a weight for each set": (
        "mix_strategy interleave_probs streaming buffer_size"
    ),
    "every turn of the assistant is learned, each behind the prompt that a server sends": "mask_history",
    "an adapter is trained, and the base stays as it is": (
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules create_new_adapter merge_adapter"
    ),
    "rows with images are not trained": (
        "image_max_pixels image_min_pixels video_max_pixels video_min_pixels freeze_vision_tower "
        "freeze_multi_modal_projector freeze_language_model train_mm_proj_only image_resolution media_dir"
    ),
    "other optimizers and block-wise updates are not trained with": (
        "use_galore use_apollo use_badam use_adam_mini use_muon"
    ),
    "the loss is the cross-entropy of each token": "use_dft_loss use_eaft_loss eaft_alpha use_asft_loss",
    "the loss takes a tile of logits at a time without it": "enable_liger_kernel",
    "decoder layers are compiled on a GPU": "use_unsloth use_unsloth_gc torch_compile use_v1_kernels",
    "the base is trained as it stands": (
        "rope_scaling shift_attn mixture_of_depths use_llama_pro upcast_layernorm upcast_lmhead_output "
        "moe_aux_loss_coef use_kt kt_optimize_rule cpu_infer chunk_size fp8 fp8_backend"
    ),
    "`lora2serve export` does it": (
        "export_dir export_size export_device export_quantization_bit export_quantization_dataset export_legacy_format"
    ),
    "`lora2serve chat` and `serve` do it": "infer_backend infer_dtype temperature top_p top_k max_new_tokens do_sample",
    "tables grow by the tokens that they lack": "resize_vocab",
    "thoughts are learned where rows have them, as the chat template writes them": "enable_thinking",
    "models come from the Hub of Hugging Face": (
        "use_modelscope use_openmind om_hub_token ms_hub_token hf_hub_token cache_dir"
    ),
    "the base is loaded where it is trained": "low_cpu_mem_usage device_map",
})  # fmt: skip
OWN_PREFIXES = {
    **PREFIXES,
    "ppo_": OWN["pref_beta"], "pref_": OWN["pref_beta"], "kto_": OWN["pref_beta"],
    "galore_": OWN["use_galore"], "apollo_": OWN["use_galore"], "badam_": OWN["use_galore"],
    "image_": OWN["image_max_pixels"], "video_": OWN["image_max_pixels"], "audio_": OWN["image_max_pixels"],
    "vllm_": OWN["infer_backend"], "sglang_": OWN["infer_backend"], "export_": OWN["export_dir"],
    "swanlab_": "the tracker's own environment variables say it",
}  # fmt: skip


def from_llamafactory(config: Mapping[str, object], home: Path) -> MovedKeys:
    """Every key moved or left out; ``home`` is the directory of the config."""
    keys = MovedKeys(config)
    keys.take("do_train")
    keys.move(MOVED)
    is_plain_text = _stage(keys) == "pt"
    _data(keys, home, {**COLUMNS, "prompt": "text"} if is_plain_text else COLUMNS)
    _adapter(keys)
    translate_loop(keys, "lr_scheduler_type")
    translate_lora(keys, {"rslora": "use_rslora", "dora": "use_dora", "init": "init_lora_weights"})
    translate_new_tokens(keys, ["add_tokens", "add_special_tokens"], "additional_target")
    translate_trackers(keys)
    translate_name(keys)
    _defaults(keys)
    keys.drop_off((*OFF, *OWN))
    keys.leave_known({**WHY, **OWN})
    keys.leave_rest(OWN_PREFIXES)
    return keys


def _defaults(keys: MovedKeys) -> None:
    for path, value in DEFAULTS.items():
        keys.put_default(path, value)
    if keys.get("train.method") is None:
        keys.put_default("train.lora.rank", 8)
        rank = keys.get("train.lora.rank")
        keys.put_default("train.lora.alpha", 2 * rank if isinstance(rank, int) else 16)


def _stage(keys: MovedKeys) -> object:
    """What is learned: answers, texts (``pt``) or preferences."""
    stage = keys.take_if("stage", ("sft", "pt"))
    translate_objective(keys, "stage", PREFERENCES)
    loss = keys.take("pref_loss")
    if loss not in (None, "sigmoid"):
        keys.leave("pref_loss", loss, "the loss of dpo is sigmoid; train.preference.loss_type names others")
    run_name = keys.take("run_name")
    if run_name is not None:
        keys.put("name", run_name, "run_name")
    return stage


def _adapter(keys: MovedKeys) -> None:
    kind = keys.take("finetuning_type")
    if kind == "oft":
        keys.put("train.method", kind, "finetuning_type")
        keys.move({"oft_block_size": "train.options.oft_block_size", "oft_rank": "train.options.r"})
    elif kind not in (None, "lora"):
        keys.leave("finetuning_type", kind, "a LoRA is written; train.method names other kinds of adapters")
    bits, method, form = keys.take("quantization_bit"), keys.take("quantization_method"), keys.take("quantization_type")
    keys.put("train.quantize", "nf4" if bits == 4 else "none", "quantization_bit")
    if bits not in (None, 4):
        keys.leave("quantization_bit", bits, EIGHT_BITS)
    if method not in (None, "bnb", "bitsandbytes"):
        keys.leave("quantization_method", method, "bitsandbytes quantizes")
    if form not in (None, "nf4"):
        keys.leave("quantization_type", form, "nf4 loses less in the same memory")
    for key, path in (("lora_target", "train.lora.targets"), ("additional_target", "train.lora.modules_to_save")):
        named = _names(keys.take_of(key, (str, list), NAMES))
        if named:
            keys.put(path, "all-linear" if named in (["all"], ["all-linear"]) else named, key)
    if keys.take("pissa_init"):
        steps = keys.take("pissa_iter")
        keys.put("train.lora.init", "pissa" if steps == -1 else f"pissa_niter_{steps or 16}", "pissa_init")
    keys.take("pissa_convert")  # a PiSSA is always kept as a plain LoRA


def _data(keys: MovedKeys, home: Path, columns: Mapping[str, str]) -> None:
    if keys.take("train_on_prompt"):
        keys.put("data.completion_only", False, "train_on_prompt")
    packing = [keys.take("packing"), keys.take("neat_packing")]
    if any(packing):
        keys.put("data.packing", True, "packing")
    translate_share(keys, "val_size")
    template = keys.take("template")
    if template is not None:
        why = "the tokenizer's own template is taken; data.chat_template gives one to a model without"
        keys.leave("template", template, why)
    file = home / str(keys.take("dataset_dir") or "data") / INDEX
    index = _read_index(file) if file.is_file() else None
    for key, path in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        names = _names(keys.take_of(key, (str, list), NAMES))
        put_sources(keys, path, [_source(keys, key, name, file, index, columns) for name in names], key)


def _read_index(file: Path) -> Mapping[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{file}: not JSON ({str(error)[:100]})") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: a {type(content).__name__}, expected a JSON object")
    return content


def _source(
    keys: MovedKeys, key: str, name: str, file: Path, index: Mapping[str, object] | None, columns: Mapping[str, str]
) -> object:
    """One data set by its name in dataset_info.json, which is ``file``; ``columns`` are their names and ours."""
    known, key = (index or {}).get(name), f"{key}: {name}"
    if not isinstance(known, dict):
        if index is None and "/" in name:
            return name
        where = f"not in {file}" if index is not None else f"named in a {INDEX}, which is not at {file.parent}"
        keys.leave(key, name, f"{where}: write its file or its Hub id into data.train")
        return name
    names, tags = (_named_in(keys, key, known, option) for option in ("columns", "tags"))
    named = {ours: names.get(theirs) for theirs, ours in columns.items()}
    named |= {"role": tags.get("role_tag"), "content": tags.get("content_tag")}
    for ours, theirs in named.items():
        if (ours, theirs) not in NATIVE:
            put_column(keys, ours, theirs, key)
    for option, value in known.items():
        if option not in INDEX_KEYS:
            keys.leave(f"{key}.{option}", value, UNKNOWN_KEY)
    for column, value in names.items():
        if value and column not in columns:
            keys.leave(f"{key}.columns.{column}", value, UNKNOWN_KEY)
    path = str(known.get("hf_hub_url") or file.with_name(str(known.get("file_name") or name)))
    place = {name: known[name] for name in ("split", "subset") if known.get(name)}
    return {"path": path, **place} if place else path


def _named_in(keys: MovedKeys, key: str, known: Mapping[str, object], option: str) -> Mapping[str, object]:
    """The columns or tags of a data set."""
    named = known.get(option) or {}
    if isinstance(named, dict):
        return named
    keys.leave(f"{key}.{option}", named, "expected keys and values")
    return {}


def _names(value: object) -> Sequence[str]:
    """Names with commas between, or a list."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [str(item).strip() for item in items if str(item).strip()]
