"""Bottleneck adapters (Houlsby et al. 2019, Pfeiffer et al. 2021), as a method of PEFT, which has none of its own.

Behind a module that gives the model's width stands a small network: ``h + up(activation(down(h)))``. It is no change of
a weight, so it cannot be merged. ``import lora2serve.bottleneck`` makes PEFT know the method; without it
``PeftModel.from_pretrained`` says that there is no ``BOTTLENECK``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch.nn import Linear, Module, ModuleDict, functional, init

NAME = "bottleneck"
ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu, "gelu": functional.gelu, "silu": functional.silu, "tanh": torch.tanh,
}  # fmt: skip


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """``kind`` says behind what it stands, where ``target_modules`` are found in the model (`lora2serve train`)."""

    kind: Literal["houlsby", "pfeiffer"] = "houlsby"  # behind attention and MLP, or behind the MLP alone
    reduction_factor: int = 16  # the model's width, by that of the bottleneck
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(NAME.upper())
        if self.reduction_factor < 1:
            raise ValueError(f"reduction_factor is {self.reduction_factor}, expected 1 or more")


class BottleneckLayer(Module, BaseTunerLayer):  # type: ignore[misc]
    """``base_layer`` and what stands behind it; of several active adapters the changes add up."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    active_adapters: list[str]  # PEFT's, as the next
    disable_adapters: bool

    def __init__(self, base_layer: Module, adapter: str, config: BottleneckConfig, width: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = ModuleDict(), ModuleDict()
        self.activations: dict[str, str] = {}
        self._active_adapter, self._disable_adapters, self.merged_adapters = adapter, False, list[str]()
        self.add(adapter, config, width)

    def add(self, adapter: str, config: BottleneckConfig, width: int) -> None:
        """One more; it changes nothing until it has learned something: what leads back is zero."""
        size = max(1, width // config.reduction_factor)
        down = self.bottleneck_down[adapter] = Linear(width, size)
        up = self.bottleneck_up[adapter] = Linear(size, width)
        for zero in (down.bias, up.weight, up.bias):
            init.zeros_(zero)
        self.activations[adapter] = config.activation
        BaseTunerLayer._move_adapter_to_device_of_base_layer(self, adapter)
        BaseTunerLayer.set_adapter(self, self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor | tuple[object, ...]:
        """Of a tuple, such as a mixture of experts gives with its router's logits, the first part is changed."""
        given = self.base_layer(*args, **kwargs)
        hidden, *rest = given if isinstance(given, tuple) else (given,)
        changed = hidden
        for name in self.active_adapters:
            if name in self.bottleneck_up and not self.disable_adapters:
                changed = changed + self._change(name, hidden).to(hidden.dtype)
        return (changed, *rest) if isinstance(given, tuple) else changed

    def _change(self, adapter: str, hidden: torch.Tensor) -> torch.Tensor:
        down, up = self.bottleneck_down[adapter], self.bottleneck_up[adapter]
        inner = down(hidden.to(down.get_parameter("weight").dtype))
        changed: torch.Tensor = up(ACTIVATIONS[self.activations[adapter]](inner))
        return changed


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """What PEFT puts bottlenecks into a model by."""

    prefix = f"{NAME}_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: Mapping[str, list[str]] = {}

    def _create_and_replace(
        self, peft_config: BottleneckConfig, adapter_name: str, target: Module, target_name: str, parent: Module,
        current_key: str, parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        width = self.model.config.get_text_config().hidden_size
        base = target.base_layer if isinstance(target, BottleneckLayer) else target
        outputs = getattr(base, "out_features", getattr(base, "nf", width))
        if outputs != width:
            raise ValueError(f"{current_key} gives {outputs} values, expected the model's width of {width}")
        if isinstance(target, BottleneckLayer):
            target.add(adapter_name, peft_config, width)
            return
        layer = BottleneckLayer(target, adapter_name, peft_config, width)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def _register() -> None:
    """PEFT registers methods that its enumeration has, and this is one member more of it."""
    name = NAME.upper()
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    register_peft_method(name=NAME, config_cls=BottleneckConfig, model_cls=BottleneckModel)


_register()
