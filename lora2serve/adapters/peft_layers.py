"""Every PEFT method that is not folded natively goes through PEFT's own layer, one module at a time.

The model's weights are zeros that take no memory; the adapter's tensors are real. For each module its base weight
is put in, PEFT merges, the weight is taken out: PEFT stays the authority, and memory stays one module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lora2serve.adapters.adapter import PREFIX, Adapter, ParameterDelta
from lora2serve.adapters.meta_model import meta_model_of, peft_config
from lora2serve.adapters.peft_methods import ALONE, BIAS_ALONE, changes_bias, has_bias, rebases
from lora2serve.errors import AdapterError, raise_all
from lora2serve.system.small_files import JsonObject

if TYPE_CHECKING:
    from torch import Tensor

Leaf = Literal["weight", "bias"]


@dataclass(frozen=True)
class PeftDelta:
    """One weight or one bias, merged by PEFT's layer."""

    layers: PeftLayers
    module: str
    leaf: Leaf = "weight"
    whole: ClassVar[bool] = True

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        """The parameter must be the one that PEFT's layer wraps."""
        expected = self.layers.base_shape(self.module, self.leaf)
        if before != expected:
            raise ValueError(f"the adapter is for {list(expected)}, the base has {list(before)}")
        return before

    def apply(self, weight: Tensor, rows: slice) -> Tensor:
        """The whole parameter in, the whole parameter out."""
        return self.layers.merge(self.module, self.leaf, weight.clone())


class PeftLayers:
    """The adapted model, real but for the base's values."""

    def __init__(self, adapter: Adapter, config: JsonObject) -> None:
        self._lock = Lock()
        self._adapter = adapter
        self._rebases = rebases(adapter)
        self.weights: dict[str, Callable[[], Tensor]] = {}  # by parameter, for a bias that depends on its weight
        try:
            self._layers = self._put_on_all(config)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, ImportError) as error:
            first = (str(error).strip().splitlines() or [""])[0][:200]
            raise AdapterError(
                f"{adapter.path}: PEFT cannot put this {adapter.method} adapter on the base ({first})",
                "use the base and the version of PEFT that it was trained with",
            ) from error

    def changes(self) -> list[ParameterDelta]:
        """What was trained beside the wrapped modules first, then one change for each wrapped parameter."""
        changes, _ = self._adapter.beside(self._layers)
        biased = [name for name, layer in self._layers.items() if has_bias(layer.get_base_layer())]
        if self._adapter.method in BIAS_ALONE:
            self._refuse_without_bias([name for name in self._layers if name not in biased])
        else:
            changes += [ParameterDelta(f"{name}.weight", PeftDelta(self, name)) for name in self._layers]
        if changes_bias(self._adapter):
            changes += [ParameterDelta(f"{name}.bias", PeftDelta(self, name, "bias")) for name in biased]
        return changes

    def _refuse_without_bias(self, names: Sequence[str]) -> None:
        """A bias that is trained alone has no place in a module of the base that has none."""
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise AdapterError(
                f"{self._adapter.path}: {self._adapter.method} cannot be merged: no bias in "
                f"{', '.join(names[:3])}{more} of the base",
                ALONE,
            )

    def base_shape(self, module: str, leaf: Leaf) -> tuple[int, ...]:
        """Shape of the base's parameter."""
        return tuple(getattr(self._layers[module].get_base_layer(), leaf).shape)

    def merge(self, module: str, leaf: Leaf, value: Tensor) -> Tensor:
        """The merged parameter in float32; PEFT's layers change themselves, so one thread at a time."""
        import torch

        bias = value if leaf == "bias" else None
        weight = self._weight_beside(module) if leaf == "bias" else value
        with self._lock, torch.no_grad():
            layer = self._layers[module]
            base = layer.get_base_layer()
            before = base.weight, getattr(base, "bias", None)
            try:
                base.weight = torch.nn.Parameter(weight, requires_grad=False)
                base.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
                if self._rebases:
                    layer = self._put_on(module, base)
                layer.merge(safe_merge=False)
                merged: Tensor = getattr(base, leaf).data
            finally:
                layer.merged_adapters.clear()
                base.weight, base.bias = before
            return merged.float()

    def _put_on_all(self, config: JsonObject) -> dict[str, Any]:
        """PEFT's layers by module name, with the adapter's tensors in them."""
        from peft import get_peft_model, set_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTunerLayer

        chosen = self._config()
        if self._adapter.method == "LORA" and self._rebases:
            chosen.init_lora_weights = True  # another one needs the base's values: see _put_on
        adapted = get_peft_model(weightless(meta_model_of(self._adapter, config)), chosen)
        layers = {
            name.removeprefix(PREFIX): module
            for name, module in adapted.named_modules()
            if isinstance(module, BaseTunerLayer) and hasattr(module, "merge")
        }
        bare = [name for name, layer in layers.items() if not hasattr(layer.get_base_layer(), "weight")]
        raise_all([f"{name}: PEFT's layer there has no weight to merge into" for name in bare], AdapterError)
        _, own = self._adapter.beside(layers)
        unknown = set_peft_model_state_dict(adapted, self._read(own)).unexpected_keys
        raise_all([f"{self._adapter.path}: {name}: unknown to PEFT" for name in unknown], AdapterError)
        return layers

    def _put_on(self, module: str, base: Any) -> Any:
        """PEFT's layer made anew on the real weight: what the init takes out of the base is taken out again."""
        import torch
        from peft import inject_adapter_in_model, set_peft_model_state_dict

        *path, last = module.split(".")
        root = parent = torch.nn.Module()
        for name in path:
            parent.add_module(name, torch.nn.Module())
            parent = getattr(parent, name)
        parent.add_module(last, base)
        inject_adapter_in_model(self._config(), root)
        _, own = self._adapter.beside(self._layers)
        here = self._read([name for name in own if name.startswith(f"{PREFIX}{module}.")])
        set_peft_model_state_dict(root, {name.removeprefix(PREFIX): value for name, value in here.items()})
        return getattr(parent, last)

    def _config(self) -> Any:
        """The adapter's config for the wrapped modules alone: what was trained beside them is folded natively."""
        chosen = peft_config(self._adapter)
        chosen.inference_mode = True
        for key, off in (("modules_to_save", None), ("trainable_token_indices", None), ("bias", "none")):
            if hasattr(chosen, key):
                setattr(chosen, key, off)
        return chosen

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        return {name: self._adapter.tensors.read(name).values for name in names}

    def _weight_beside(self, module: str) -> Tensor:
        import torch

        if self._adapter.method == "GLORA":
            return self.weights[f"{module}.weight"]()
        return torch.zeros(self.base_shape(module, "weight"))


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
