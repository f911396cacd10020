"""Every PEFT method that is not folded natively goes through PEFT's own layer, one module at a time.

The model's weights are zeros that take no memory; the adapter's tensors are real. For each module its base weight
is put in, PEFT merges, the weight is taken out: PEFT stays the authority, and memory stays one module.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar

from lora2serve.adapter import Adapter, Change
from lora2serve.errors import AdapterError
from lora2serve.skeleton import meta_model, peft_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

# LoRA variants whose merge is PEFT's own; the rest of LoRA is folded natively.
VARIANTS = ("use_qalora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config")
# Inits that took a part of the base into the adapter; PEFT takes it out again while it loads.
REBASING = ("pissa", "olora")
UNMERGEABLE = {
    "alora_invocation_tokens": "activated LoRA switches on in mid-prompt",
    "arrow_config": "Arrow chooses among adapters for each token",
}
UNREPEATABLE = ("corda", "loftq", "lora_ga", "pissa_niter")


def needs_peft(adapter: Adapter) -> bool:
    """Whether PEFT's own layer must do the merge."""
    config = adapter.config
    return not adapter.is_lora or any(config.get(key) for key in VARIANTS) or _init(config).startswith(REBASING)


def refuse_unmergeable(adapter: Adapter) -> None:
    """AdapterError for what no merge can hold, with the way out."""
    for key, why in UNMERGEABLE.items():
        if adapter.config.get(key):
            raise AdapterError(f"{adapter.path}: {key}: {why}, so it cannot be merged", "serve it with PEFT itself")
    if _init(adapter.config).startswith(UNREPEATABLE):
        raise AdapterError(
            f"{adapter.path}: init_lora_weights {_init(adapter.config)!r} changed the base: that cannot be repeated",
            "save it as a plain LoRA by PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL)",
        )


@dataclass(frozen=True)
class ByPeft:
    """One weight, merged by PEFT's layer."""

    layers: PeftLayers
    module: str
    whole: ClassVar[bool] = True

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        """The weight must be the one that PEFT's layer wraps."""
        expected = self.layers.weight_shape(self.module)
        if before != expected:
            raise ValueError(f"the adapter is for {list(expected)}, the base has {list(before)}")
        return before

    def apply(self, weight: Tensor, rows: slice) -> Tensor:
        """The whole weight in, the whole weight out."""
        return self.layers.merge(self.module, weight.clone())


class PeftLayers:
    """The adapted model, real but for the base's values."""

    def __init__(self, adapter: Adapter, config: Mapping[str, Any]) -> None:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._lock = Lock()
        self._init = _init(adapter.config) if adapter.is_lora else ""
        self._config = config
        try:
            chosen = peft_config(adapter)
            if self._init:
                chosen.init_lora_weights = True  # the init needs the base's values: see _repeat_init
            adapted = PeftModel.from_pretrained(weightless(meta_model(config)), str(adapter.path), config=chosen)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            first = (str(error).strip().splitlines() or [""])[0][:200]
            raise AdapterError(
                f"{adapter.path}: PEFT cannot put this {adapter.method} adapter on the base ({first})",
                "use the base and the version of PEFT that it was trained with",
            ) from error
        self._layers = {
            name.removeprefix("base_model.model."): module
            for name, module in adapted.named_modules()
            if isinstance(module, BaseTunerLayer)
            and hasattr(module, "merge")
            and hasattr(module.get_base_layer(), "weight")
        }

    def changes(self) -> list[Change]:
        """One change for each wrapped module."""
        return [Change(f"{name}.weight", ByPeft(self, name)) for name in self._layers]

    def weight_shape(self, module: str) -> tuple[int, ...]:
        """Shape of the base weight."""
        return tuple(self._layers[module].get_base_layer().weight.shape)

    def merge(self, module: str, weight: Tensor) -> Tensor:
        """The merged weight in float32; PEFT's layers change themselves, so one thread at a time."""
        import torch

        with self._lock, torch.no_grad():
            layer = self._layers[module]
            base = layer.get_base_layer()
            empty, base.weight = base.weight, torch.nn.Parameter(weight, requires_grad=False)
            bias, base.bias = getattr(base, "bias", None), None
            try:
                if self._init.startswith(REBASING):
                    self._repeat_init(layer)
                layer.merge(safe_merge=False)
                merged: Tensor = base.weight.data
            finally:
                layer.merged_adapters.clear()
                base.weight, base.bias = empty, bias
            return merged.float()

    def _repeat_init(self, layer: Any) -> None:
        """Let PEFT repeat the init that moved a part of the base into A and B, then put the trained A and B back."""
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        trained = a.data.clone(), b.data.clone()
        if self._init.startswith("pissa"):
            layer.pissa_init("default", self._init)
        else:
            layer.olora_init("default")
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = trained


def weightless(model: Any) -> Any:
    """A meta model moved to the CPU with zeros of stride 0: every shape is there, no memory is."""
    import torch

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zeros = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(zeros, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros((), dtype=buffer.dtype).expand(buffer.shape))
    return model


def _init(config: Mapping[str, Any]) -> str:
    told = config.get("init_lora_weights")
    return told.lower() if isinstance(told, str) else ""
