"""The base as training sees it (quantized or not) and the adapter on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.config import lora_inits
from lora2serve.config.recipe import TrainRecipe
from lora2serve.errors import TrainError, did_you_mean, first_line
from lora2serve.weights.bnb.cpu import use_plain_cpu_kernels
from lora2serve.weights.checkpoint import read_config

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

QV = ("q_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "in_proj_qkv")
OTHER_TOWERS = ("vision", "visual", "audio")


@dataclass(frozen=True)
class Device:
    """Where and in which type it computes."""

    name: str  # cuda or cpu
    dtype: str  # bfloat16 where the GPU has it, float16 on older ones, float32 on a CPU

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.name == "cuda"


def device() -> Device:
    """The device at hand."""
    import torch

    if not torch.cuda.is_available():
        return Device("cpu", "float32")
    return Device("cuda", "bfloat16" if torch.cuda.is_bf16_supported() else "float16")


def load_base(path: Path, recipe: TrainRecipe, device: Device) -> PreTrainedModel:
    """The causal language model at ``path``, quantized as the recipe says."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, device.dtype)
    options: dict[str, object] = {"dtype": dtype}
    if recipe.quantize != "none" and not read_config(path).get("quantization_config"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=recipe.quantize,
            bnb_4bit_use_double_quant=recipe.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    if device.on_gpu:
        options["device_map"] = {"": 0}
    try:
        model = AutoModelForCausalLM.from_pretrained(str(path), **options)
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        raise TrainError(
            f"{path}: no causal language model that transformers can load ({first_line(error)})",
            "name a text-generation model in model.path",
        ) from error
    model.config.use_cache = False
    return use_plain_cpu_kernels(model) if recipe.quantize != "none" else model


def prepare(model: PreTrainedModel, *, checkpointing: bool) -> PreTrainedModel:
    """The base, ready to carry an adapter.

    What a quantized base keeps in 16 bits (norms, embeddings, head) goes to float32 where that is float16, whose range
    it may leave. In bfloat16 it stays: autocast would round a float32 head back at every step, and both take as much
    memory again as the 4-bit weights where the vocabulary is large.
    """
    import torch
    from peft import prepare_model_for_kbit_training

    if getattr(model, "is_quantized", False) and model.dtype != torch.bfloat16:
        return prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        )
    if checkpointing:
        model.enable_input_require_grads()
    return model


def lora_config(model: PreTrainedModel, recipe: TrainRecipe) -> LoraConfig:
    """PEFT's configuration for the recipe's adapter; TrainError for a module that ``model`` does not have."""
    from peft import LoraConfig

    lora = recipe.lora
    if getattr(model, "is_quantized", False) and lora_inits.changes_base(lora.init):
        raise TrainError(
            f"train.lora.init: {lora.init} takes a part of the base out, which a quantized base cannot give",
            "set another init, or model.path to the 16-bit model",
        )
    _refuse_unknown("train.lora.modules_to_save", lora.modules_to_save, [name for name, _ in model.named_modules()])
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets(model, lora.targets),
        exclude_modules=_other_towers(model),
        modules_to_save=list(lora.modules_to_save) or None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights=True if lora.init == "default" else lora.init,
    )


def add_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """A PEFT model with a fresh LoRA, ready to train; ``model`` comes from ``prepare``, ``config`` from above."""
    from peft import get_peft_model

    try:
        return get_peft_model(model, config)
    except (ValueError, TypeError, AssertionError, NotImplementedError) as error:
        raise TrainError(f"train.lora: {first_line(error)}") from error


def _refuse_unknown(key: str, names: Sequence[str], paths: Sequence[str]) -> None:
    unknown = [name for name in names if not any(path == name or path.endswith(f".{name}") for path in paths)]
    if unknown:
        leaves = sorted({leaf for path in paths if (leaf := path.rsplit(".", 1)[-1]) and not leaf.isdigit()})
        near = did_you_mean(unknown[0], leaves)
        raise TrainError(
            f"{key}: no module {', '.join(map(repr, unknown))} in this model{near}", f"it has: {', '.join(leaves)}"
        )


def targets(model: PreTrainedModel, preset: str | Sequence[str]) -> list[str]:
    """Module names: a preset's, looked up in the real model, or those of the recipe, once each is known to be there."""
    if not isinstance(preset, str):
        _refuse_unknown("train.lora.targets", preset, _adaptable(model))
        return list(preset)
    paths = linear_modules(model)
    attention = [path for path in paths if "attn" in path or "attention" in path]
    qv = [path for path in paths if path.rsplit(".", 1)[-1] in QV]
    chosen = {
        "qv": qv,
        "attention": attention,
        "qv-mlp": qv + [path for path in paths if path not in set(attention)],
        "all-linear": paths,
    }[preset]
    if not chosen:
        leaves = sorted({path.rsplit(".", 1)[-1] for path in paths})
        raise TrainError(
            f"train.lora.targets: preset {preset} finds no module in this model", f"name them: {', '.join(leaves)}"
        )
    return _suffixes(chosen, paths)


def _suffixes(chosen: Sequence[str], paths: Sequence[str]) -> list[str]:
    """The shortest endings that name the chosen modules and no other: GPT-2 has two kinds of ``c_proj``."""
    others = set(paths) - set(chosen)
    suffixes = set()
    for path in chosen:
        parts = path.split(".")
        endings = (".".join(parts[n:]) for n in range(len(parts) - 1, -1, -1))
        suffixes.add(next(end for end in endings if not any(f".{other}".endswith(f".{end}") for other in others)))
    return sorted(suffixes)


def _adaptable(model: PreTrainedModel) -> list[str]:
    """Dotted names of every module that can carry a LoRA, head and embeddings too."""
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = torch.nn.Linear | torch.nn.Embedding | Conv1D
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def linear_modules(model: PreTrainedModel) -> list[str]:
    """Dotted names of the linear layers, without the head and without routers of experts."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module is not head
        and not name.endswith((".gate", ".router"))
    ]


def quantized_modules(model: PreTrainedModel) -> list[str]:
    """Dotted names of the modules that bitsandbytes really replaced."""
    if not getattr(model, "is_quantized", False):
        return []
    import bitsandbytes as bnb

    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _other_towers(model: PreTrainedModel) -> str | None:
    """A pattern for the modules that do not belong to the language model of a multimodal one."""
    towers = any(tower in name for name in linear_modules(model) for tower in OTHER_TOWERS)
    return rf".*({'|'.join(OTHER_TOWERS)}).*" if towers else None
