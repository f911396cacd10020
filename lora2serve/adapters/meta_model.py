"""The model's class without its weights: what transformers calls each stored tensor, and what PEFT wraps.

Built on the meta device, and only where names on disk and names in the adapter differ.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora2serve.adapters.adapter import PREFIX
from lora2serve.adapters.wrappers import NAMES_OF_CONFIG
from lora2serve.errors import MergeError
from lora2serve.system.small_files import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora2serve.adapters.adapter import Adapter


# Model types with transformers' Conv1D, which stores its weight as (in, out).
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")


@dataclass(frozen=True)
class StoredParameter:
    """One stored tensor and the parameter that it becomes, or becomes a part of."""

    stored: str
    model_name: str
    fused: bool = False
    stacks: bool = False  # fused by stacking experts and joining rows, and nothing else
    expert: int = 0
    part: int = 0  # place among the tensors that are joined row by row (gate before up)


@dataclass(frozen=True)
class Wrapped:
    """What PEFT's ``ParamWrapper`` knows of one parameter it adapts."""

    parameter: str
    experts: int
    swapped: bool  # stored as (experts, in, out)
    scale: float


class MetaModel:
    """One model on the meta device, and how transformers loads stored tensors into it."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        self.model = model
        self._state = self.model.state_dict()
        self._modules = dict(self.model.named_modules())
        transforms = get_model_conversion_mapping(self.model)
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._renamings = [t for t in transforms if not isinstance(t, WeightConverter)]

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._state

    def model_name(self, stored: str) -> str:
        """The parameter that a stored name (of this or an older version) becomes."""
        return self._rename(stored)[0]

    def source(self, stored: str) -> StoredParameter:
        """One stored tensor, placed."""
        from transformers.core_model_loading import Concatenate, MergeModulelist

        name, pattern = self._rename(stored)
        if pattern is None:
            return StoredParameter(stored, name)
        converter = next(c for c in self._converters if pattern in c.source_patterns)
        operations = converter.operations
        stacks = all(
            (isinstance(op, MergeModulelist) and op.dim == 0) or (isinstance(op, Concatenate) and op.dim == 1)
            for op in operations
        )
        return StoredParameter(
            stored, name, True, stacks, _expert_number(stored), converter.source_patterns.index(pattern)
        )

    def is_transposed(self, module: str) -> bool:
        """Whether a module, by its name in the adapter, stores its weight as (in, out)."""
        from transformers.pytorch_utils import Conv1D

        name = self.model_name(f"{module}.weight").removesuffix(".weight")
        return isinstance(self._modules.get(name), Conv1D)

    def experts_order(self, module: str) -> tuple[bool | None, bool] | None:
        """Of fused experts: whether their weights lie transposed (None: the class does not say), and whether gate and
        up come in turns. None where the class has no such module.
        """
        experts = self._modules.get(module)
        if experts is None:
            return None
        return getattr(experts, "is_transposed", None), getattr(experts, "is_concatenated", True) is False

    def wrapped_parameters(self, adapter: Adapter) -> dict[str, Wrapped]:
        """Adapter module name (``...experts``, ``...experts.base_layer``) -> the parameter PEFT wraps there."""
        import torch
        from peft import get_peft_model
        from peft.tuners.lora.layer import ParamWrapper

        with torch.device("meta"):
            model = type(self.model)(self.model.config)  # PEFT changes the one that it gets
        adapted = get_peft_model(model, peft_config(adapter), low_cpu_mem_usage=True)
        wrapped = {}
        for name, module in adapted.named_modules():
            if isinstance(module, ParamWrapper):
                path = name.removeprefix("base_model.model.")
                owner = re.sub(r"(\.base_layer)+$", "", path)
                wrapped[path] = Wrapped(
                    f"{owner}.{module.parameter_name}",
                    module.num_experts,
                    module.num_experts > 1 and not module._did_swap_in_out_features,
                    module.scaling["default"],
                )
        return wrapped

    def _rename(self, stored: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        renamed: tuple[str, str | None] = rename_source_key(
            stored, self._renamings, self._converters, self.model.base_model_prefix, self._state
        )
        return renamed


def stores_transposed(config: JsonObject) -> bool:
    """Whether any layer of the model, or of a part of it, may be stored as (in, out)."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return any(part.get("model_type") in TRANSPOSED for part in parts)


def ties_by_default(config: JsonObject) -> bool:
    """What the class of a config takes for ``tie_word_embeddings`` where the file does not say; False if unknown."""
    import transformers

    try:
        parsed = transformers.AutoConfig.for_model(**{"model_type": None, **config})
    except Exception:  # an unknown type, or values that its class refuses
        return False
    return bool(getattr(parsed, "tie_word_embeddings", False))


def meta_models(config: JsonObject) -> Iterator[PreTrainedModel]:
    """The classes that an adapter of this base may have been trained in, without weights.

    First the one that ``config.architectures`` names. Then what ``AutoModelForCausalLM`` makes of the base, where that
    is another: of Qwen3.5, Llama 4 and others the text model alone, whose modules have other names.
    """
    import torch
    import transformers

    declared = meta_model(config)
    yield declared
    try:
        with torch.device("meta"):
            causal = transformers.AutoModelForCausalLM.from_config(declared.config)
    except ValueError:  # no such class for this type
        return
    if type(causal) is not type(declared):
        yield causal


def meta_model_of(adapter: Adapter, config: JsonObject) -> PreTrainedModel:
    """The one of these classes that has the adapter's modules; the first where none has."""
    names = [spec.name.removeprefix(PREFIX) for spec in adapter.tensors.specs()]
    first = None
    for model in meta_models(config):  # the second is only made where the first has none of them
        first = first or model
        modules = dict(model.named_modules())
        if any(_module_around(name, modules) for name in names):
            return model
    assert first is not None
    return first


def _module_around(name: str, modules: Container[str]) -> bool:
    """Whether a tensor of an adapter lies in one of ``modules``: ``...q_proj.lora_A.weight``, ``...q_proj.oft_R``."""
    return any(name.rsplit(".", depth)[0] in modules for depth in (1, 2, 3) if name.count(".") >= depth)


def meta_model(config: JsonObject) -> PreTrainedModel:
    """The class that ``config.architectures`` names, without weights."""
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    if config.get("auto_map"):
        raise MergeError(
            "the base needs its own code (auto_map) to name its tensors", "lora2serve never runs such code"
        )
    try:
        parsed = transformers.AutoConfig.for_model(**config)
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise MergeError(f"transformers does not take the base's config.json: {reason[:200]}") from None
    named = getattr(transformers, (config.get("architectures") or [""])[0], None)
    cls = named if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel) else None
    with torch.device("meta"):
        model: PreTrainedModel = (
            cls(parsed) if cls is not None else transformers.AutoModelForCausalLM.from_config(parsed)
        )
        return model


def peft_config(adapter: Adapter) -> Any:
    """The adapter's config as PEFT reads it."""
    from peft import PeftConfig

    chosen = PeftConfig.from_pretrained(str(adapter.path))
    for key in NAMES_OF_CONFIG:  # without the wrappers that may be in the file
        names = adapter.config.get(key)
        if isinstance(names, Mapping | list) and hasattr(chosen, key):
            setattr(chosen, key, set(names) if isinstance(getattr(chosen, key), set) else names)
    return chosen


def _expert_number(name: str) -> int:
    """The expert in a stored name such as ``...experts.7.w1.weight``."""
    match = re.search(r"\.(\d+)\.[^.]+(\.weight)?$", name)
    return int(match[1]) if match else 0
