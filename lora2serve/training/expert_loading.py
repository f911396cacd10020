"""transformers' way of loading a model in 4 bits, which knows linear layers, for experts too: a weight at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationMethod

from lora2serve.training.expert_layers import compute_in_four_bits, quantizable, quantize_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import ConversionOps

METHOD = "bitsandbytes_and_experts"


class FourBitConfig(BitsAndBytesConfig):  # type: ignore[misc]
    """bitsandbytes' settings for linear layers, which hold for the weights of experts, too."""

    def __init__(self, quant_type: str, double_quant: bool, dtype: torch.dtype, storage: torch.dtype) -> None:
        super().__init__(
            load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=storage,
        )  # fmt: skip
        self.quant_method = METHOD


@register_quantizer(METHOD)
class ExpertQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """Quantizes each weight when it has been read and put together; the next one is read after that."""

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **options: object) -> bool:
        """Whether it is the weight of a linear layer, or of experts."""
        module, name = get_module_from_name(model, param_name)
        return quantizable(module, name) or bool(super().param_needs_quantization(model, param_name, **options))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options: object) -> PreTrainedModel:
        loaded: PreTrainedModel = super()._process_model_after_weight_loading(model, **options)
        loaded.quantization_method = QuantizationMethod.BITS_AND_BYTES  # to trainers it is nothing else
        return loaded

    def get_quantize_ops(self) -> ConversionOps:
        """What transformers does with one such weight."""
        return _Quantize(self)


class _Quantize(Bnb4bitQuantize):  # type: ignore[misc]
    def convert(
        self, input_dict: dict[str, list[Tensor]], full_layer_name: str | None = None,
        model: PreTrainedModel | None = None, **options: object,
    ) -> dict[str, Tensor]:  # fmt: skip
        made: dict[str, Tensor] = {}
        for path, values in input_dict.items():  # several where what is stored together becomes several weights
            weights = values[0] if isinstance(values, list) else values
            aside = weights.device.type == "cpu" and torch.cuda.is_available()
            if aside:  # cut into parts later: quantized where it is computed with, and kept beside it until then
                weights = weights.cuda()
            module, name = get_module_from_name(model, path)
            if quantizable(module, name):
                made[path] = self._quantized(module, name, weights)
            else:
                made |= super().convert({path: [weights]}, full_layer_name, model, **options)
            if aside:
                made[path].data = made[path].data.cpu()
        return made

    def _quantized(self, module: Module, name: str, weights: Tensor) -> Tensor:
        """The codes of experts, with which their module computes from now on."""
        how = self.hf_quantizer.quantization_config
        codes, state = quantize_experts(
            weights, how.bnb_4bit_quant_type, how.bnb_4bit_use_double_quant, how.bnb_4bit_quant_storage
        )
        compute_in_four_bits(module, name, codes, state)
        vars(module)["_is_hf_initialized"] = True
        packed: Tensor = codes
        return packed
