"""The base as training sees it (quantized or not) and the adapter on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.artifacts.run_record import QuantizationRecord
from lora2serve.config import lora_inits
from lora2serve.config.recipe import TrainRecipe
from lora2serve.data.new_tokens import NO_TOKENS, NewTokens
from lora2serve.errors import TrainError, first_line
from lora2serve.planning.gpus import GpuModel
from lora2serve.planning.plan_settings import ComputeType
from lora2serve.system.hardware import memory_bytes
from lora2serve.training import ranks
from lora2serve.training.cpt_loss import learn_every_label, leave_loss_to_trainer
from lora2serve.training.expert_layers import four_bit_parameters
from lora2serve.training.lora_targets import other_towers, refuse_unknown, target_parameters, targets
from lora2serve.training.new_rows import start_rows, trained_rows
from lora2serve.weights.bnb.cpu import use_plain_cpu_kernels
from lora2serve.weights.bnb.library import import_quietly
from lora2serve.weights.checkpoint import read_config
from lora2serve.weights.language_model import load_language_model

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel

# What PEFT raises for options that do not go together, or with the model, beside torch's RuntimeError.
UNFIT = (ValueError, TypeError, AssertionError, ArithmeticError, LookupError, AttributeError)


@dataclass(frozen=True)
class Device:
    """Where and in which type it computes."""

    name: str  # cuda or cpu
    dtype: ComputeType

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


def device_model(device: Device) -> GpuModel:
    """The device as a plan knows one: without a GPU, the main memory."""
    if not device.on_gpu:
        return GpuModel("the main memory", memory_bytes() // ranks.local_processes(), device.dtype)
    import torch

    properties = torch.cuda.get_device_properties(0)
    return GpuModel(properties.name, properties.total_memory, device.dtype)


def free_memory(device: Device) -> int:
    """Bytes of it that no other program has."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if device.on_gpu else memory_bytes() // ranks.local_processes()


def load_base(path: Path, recipe: TrainRecipe, device: Device, *, sharded: bool = False) -> PreTrainedModel:
    """The causal language model at ``path``, quantized as the recipe says.

    sharded: it is to be cut into parts: codes that can be sent, and beside the GPU, which may not hold all of them.
    """
    import torch
    from safetensors import SafetensorError

    options: dict[str, object] = {"dtype": getattr(torch, device.dtype)}
    if recipe.quantize != "none":
        import_quietly()
    if recipe.quantize != "none" and not read_config(path).get("quantization_config"):
        options["quantization_config"] = four_bit(recipe, device.dtype, sharded=sharded)
    if device.on_gpu:
        options["device_map"] = {"": "cpu" if sharded else 0}
    try:
        model = load_language_model(path, **options)
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        raise TrainError(
            f"{path}: no causal language model that transformers can load ({first_line(error)})",
            "name a text-generation model in model.path",
        ) from error
    model.config.use_cache = False
    return use_plain_cpu_kernels(model) if recipe.quantize != "none" else model


def four_bit(recipe: TrainRecipe, dtype: ComputeType, *, sharded: bool = False) -> BitsAndBytesConfig:
    """How bitsandbytes quantizes the base of a recipe that asks for it, to compute in ``dtype``.

    Codes that are sent from process to process lie in numbers of that type, for other libraries' sake.
    """
    import torch

    from lora2serve.training.expert_loading import FourBitConfig

    computed = getattr(torch, dtype)
    return FourBitConfig(recipe.quantize, recipe.double_quant, computed, computed if sharded else torch.uint8)


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


def lora_config(model: PreTrainedModel, recipe: TrainRecipe, new_tokens: Sequence[int] = ()) -> LoraConfig:
    """PEFT's configuration for the recipe's adapter, which trains the rows of ``new_tokens``, too.

    TrainError for a module that ``model`` does not have.
    """
    from peft import LoraConfig

    lora = recipe.lora
    if getattr(model, "is_quantized", False) and lora_inits.changes_base(lora.init):
        raise TrainError(
            f"train.lora.init: {lora.init} takes a part of the base out, which a quantized base cannot give",
            "set another init, or model.path to the 16-bit model",
        )
    refuse_unknown("train.lora.modules_to_save", lora.modules_to_save, [name for name, _ in model.named_modules()])
    chosen = targets(model, lora.targets)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=chosen,
        target_parameters=target_parameters(model, lora.target_parameters),
        exclude_modules=other_towers(model),
        modules_to_save=list(lora.modules_to_save) or None,
        trainable_token_indices=(
            trained_rows(model, new_tokens, [*chosen, *lora.modules_to_save]) if new_tokens else None
        ),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights=True if lora.init == "default" else lora.init,
    )


def add_adapter(model: PreTrainedModel, config: PeftConfig, new_tokens: NewTokens = NO_TOKENS) -> PeftModel:
    """A PEFT model with a fresh adapter, ready to train; ``model`` comes from ``prepare``.

    new_tokens: those whose rows ``config`` trains.
    """
    import torch
    from peft import get_peft_model

    from lora2serve.training.expert_lora import open_to_peft

    if config.peft_type == "CPT":
        leave_loss_to_trainer()
    try:
        with open_to_peft(model):
            tuned: PeftModel = get_peft_model(model, config)
    except torch.OutOfMemoryError:
        raise
    except (*UNFIT, RuntimeError) as error:
        raise TrainError(f"{section_of(config)}: {first_line(error)}") from error
    if config.peft_type == "CPT":
        learn_every_label(tuned)
    if new_tokens.ids:
        start_rows(tuned, new_tokens)
    return tuned


def section_of(config: PeftConfig) -> str:
    """Where a recipe describes the adapter of that configuration."""
    return "train.lora" if config.peft_type == "LORA" else "train.options"


def quantization_of(model: PreTrainedModel, device: Device) -> QuantizationRecord | None:
    """How a base is quantized as it was loaded; None where it is not."""
    modules = _quantized_modules(model)
    if not modules:
        return None
    config = model.config.quantization_config
    return QuantizationRecord(
        type=config.bnb_4bit_quant_type if config.load_in_4bit else "int8",
        double_quant=config.bnb_4bit_use_double_quant, block_size=64, compute_dtype=device.dtype,
        modules=tuple(modules), experts=tuple(four_bit_parameters(model)),
    )  # fmt: skip


def _quantized_modules(model: PreTrainedModel) -> list[str]:
    """Dotted names of the modules that bitsandbytes really replaced."""
    if not getattr(model, "is_quantized", False):
        return []
    import bitsandbytes as bnb

    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]
