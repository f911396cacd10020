"""The references: the base and the adapter in PEFT's own layers, with nothing folded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora2serve.adapters.adapter import open_adapter
from lora2serve.adapters.peft_loading import load_adapter
from lora2serve.adapters.soft_prompt import KINDS, soft_prompt_of
from lora2serve.errors import EngineError
from lora2serve.merge.binding import Binder
from lora2serve.parity_check.engines import Ids, Messages, Scores
from lora2serve.parity_check.engines.chat_engine import AnswerOptions, End, Say
from lora2serve.parity_check.engines.transformers_engine import Transformers, device, logits, quiet, training_dtype
from lora2serve.training.expert_layers import four_bit_modules, four_bit_of, four_bit_parameters
from lora2serve.training.expert_lora import open_to_peft
from lora2serve.training.generation import Likeliest, greedy
from lora2serve.training.new_rows import grow
from lora2serve.weights.bnb.cpu import use_plain_cpu_kernels
from lora2serve.weights.bnb.fake_quantized import FakeQuantized, Quantization
from lora2serve.weights.bnb.library import import_quietly
from lora2serve.weights.checkpoint import Checkpoint
from lora2serve.weights.dequantize import Dequantized
from lora2serve.weights.language_model import load_language_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Peft(Transformers):
    """transformers + PEFT on the base as it was trained (``quantization`` as in run.json) or in full precision.

    Several ``adapters`` are active together: their changes add up. With none it is the base alone. The base is loaded
    in the type that training computed in, since bitsandbytes dequantizes to that; the arithmetic is float32. Where
    another device ``trained_on`` it (cuda or cpu), the 4-bit codes are those of that device, not of this one. One that
    is ``as_served`` computes in the type of this device. ``soft_prompt``: the tokens that it is in an export.
    """

    soft_prompt: tuple[str, ...] = ()

    def __init__(
        self,
        base: str,
        adapters: Sequence[str],
        tokenizer: str,
        quantization: Mapping[str, Any] | None = None,
        trained_on: str | None = None,
        threads: int | None = None,
        *,
        as_served: bool = False,
    ) -> None:
        import peft
        import torch
        import transformers
        from transformers import AutoTokenizer

        quiet(threads)
        device_name = device()
        self.dtype = training_dtype() if as_served else "float32"
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype), "device_map": device_name}
        if quantization:
            import_quietly()
            options |= _quantized(base, quantization)
        model = load_language_model(base, **options)
        if quantization:
            _check_modules(model, [*quantization["modules"], *quantization.get("experts", ())])
            if "quantization_config" in options and trained_on not in (None, device_name):
                _requantize(model, base, Quantization.of({"quantization": quantization, "device": trained_on}))
            if self.dtype == "float32":
                _compute_in_float32(model)
        grow(model, len(self.tokenizer))  # tokens were added at training
        self._add(model.eval(), adapters)
        named = f"{quantization['type']} base" if quantization else "full-precision base"
        self.version = (
            f"peft {peft.__version__} on transformers {transformers.__version__}, {named}, {self.dtype} {device_name}"
        )

    def _add(self, model: PreTrainedModel, adapters: Sequence[str]) -> None:
        self.adapters = [f"part{number}" for number in range(len(adapters))]
        self.model = model
        for name, path in zip(self.adapters, adapters, strict=True):
            with open_to_peft(model):
                if name == self.adapters[0]:
                    self.model = load_adapter(model, path, name).eval()
                else:
                    self.model.load_adapter(path, name)
        if len(self.adapters) > 1:
            self.model.base_model.set_adapter(self.adapters)
        opened = [open_adapter(Path(path)) for path in adapters]
        soft = [soft_prompt_of(adapter) for adapter in opened if adapter.method in KINDS]
        self.soft_prompt = soft[0].tokens if soft else ()

    def positions(self) -> int | None:
        limit = super().positions()
        return limit - len(self.soft_prompt) if limit else limit

    def pairs(self, sequences: Sequence[Ids]) -> Iterator[tuple[Scores, Scores | None]]:
        """The tuned model and its base (adapter off) on each sequence; None where there is no adapter."""
        for ids in sequences:
            tuned = logits(self.model, ids)
            if not self.adapters:
                yield Scores(tuned), None
                continue
            with self.model.disable_adapter():
                yield Scores(tuned), Scores(logits(self.model, ids))

    def likeliest(self, prompts: Sequence[Ids], new_tokens: int, top: int) -> list[tuple[list[int], Likeliest]]:
        """Greedy answers with the ``top`` likeliest tokens of each step."""
        stop = self.stop_ids() or []
        return [greedy(self.model, self.tokenizer, ids, new_tokens, stop, top) for ids in prompts]

    def generate_base(self, prompts: Sequence[Ids], new_tokens: int) -> list[list[int]]:
        """Greedy answers of the base alone."""
        with self.model.disable_adapter():
            return self.generate(prompts, new_tokens)

    def reply_base(self, messages: Messages, options: AnswerOptions, say: Say) -> End:
        """``reply`` of the base alone."""
        with self.model.disable_adapter():
            return self.reply(messages, options, say)


def _quantized(base: str, quantization: Mapping[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig, BitsAndBytesConfig

    from lora2serve.training.expert_loading import FourBitConfig

    dtype = getattr(torch, quantization["compute_dtype"])
    if getattr(AutoConfig.from_pretrained(base), "quantization_config", None):
        return {"dtype": dtype}  # the base came quantized
    if quantization.get("experts"):
        four_bit = FourBitConfig(quantization["type"], quantization["double_quant"], dtype, torch.uint8)
        return {"dtype": dtype, "quantization_config": four_bit}
    config = BitsAndBytesConfig(  # of a model without experts, or by an earlier release
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization["type"],
        bnb_4bit_use_double_quant=quantization["double_quant"],
        bnb_4bit_compute_dtype=dtype,
    )
    return {"dtype": dtype, "quantization_config": config}


def _check_modules(model: Any, recorded: Sequence[str]) -> None:
    """The same modules must be quantized as at training, or this is another model."""
    import bitsandbytes as bnb

    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    quantized = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    quantized |= set(four_bit_parameters(model))
    different = sorted(quantized ^ set(recorded))
    if different:
        raise EngineError(
            f"the base is not quantized as at training: {len(different)} modules differ, the first is {different[0]}",
            "use the versions of transformers and bitsandbytes in run.json",
        )


def _requantize(model: Any, base: str, how: Quantization) -> None:
    checkpoint = Checkpoint(Path(base))
    names = Binder(list(checkpoint.specs()), checkpoint.config)
    fake_quantized = FakeQuantized(Dequantized(checkpoint), how, names)
    for name in how.modules:
        weight = model.get_submodule(name).weight
        codes, absmax = fake_quantized.quantized(f"{name}.weight")
        weight.data.copy_(codes.view_as(weight.data))
        state = weight.quant_state
        state.absmax, state.nested = absmax.to(weight.device), False
        state.offset = state.state2 = None
    for path, module in four_bit_modules(model):
        for name, state in four_bit_of(module).states.items():
            codes, absmax = fake_quantized.quantized(f"{path}.{name}")
            packed = module.get_parameter(name).data
            packed.copy_(codes.view_as(packed))
            state.absmax, state.nested = absmax.view(state.absmax.shape).to(state.absmax.device), False
            state.offset = state.state2 = None


def _compute_in_float32(model: Any) -> None:
    import bitsandbytes as bnb
    import torch

    for module in use_plain_cpu_kernels(model).modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    for _, module in four_bit_modules(model):
        four_bit_of(module).dtype = torch.float32
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
