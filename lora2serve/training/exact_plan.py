"""The recipe's own way on fake tensors: what a training allocates, without weights and without a GPU.

Runs in a process of its own (``WorkerProcess``), since it replaces what a CPU would do otherwise than a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lora2serve.config.objectives import SFT
from lora2serve.config.recipe import LoraRecipe, Quantize, TrainRecipe
from lora2serve.config.schema import build
from lora2serve.data.new_tokens import NewTokens
from lora2serve.planning.plan_settings import ComputeType, PlanSettings
from lora2serve.system.worker_protocol import Link
from lora2serve.training import fake_gpu
from lora2serve.training.adapter_casts import AdapterCasts
from lora2serve.training.fake_weights import materialize, quantize
from lora2serve.training.method_config import adapter_config
from lora2serve.training.model import add_adapter, four_bit, prepare
from lora2serve.training.storage_tracker import StorageTracker
from lora2serve.weights.language_model import weightless_language_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.utils import ModelOutput

MOST_KINDS = 8  # of layers, of which the first that have them all are run


class ExactPlan:
    """A worker: ``measure`` is its job."""

    def __init__(self, link: Link) -> None:
        self._mode = FakeTensorMode()  # one for all: libraries keep tables of values

    def measure(self, path: str, settings: Mapping[str, object]) -> dict[str, int]:
        """Bytes of the model at ``path`` (its config.json) as it is trained with ``settings``, a PlanSettings.

        ``weights``, of these ``quantization_state``, ``adapter``, ``trainable`` (values) and ``parameters`` (values) of
        the whole; ``layers``; and of activations ``stored`` for each layer, and beside it ``head`` and ``layer``, as in
        ``ActivationMemory``, from runs of few layers.
        """
        chosen = _settings(settings)
        fake_gpu.install(chosen)
        whole = _FakeTraining(Path(path), chosen, None, self._mode)
        few = _few_layers(whole.config)
        if 2 * few >= whole.layers:
            stored, (head, layer) = 0, whole.step()
        else:
            first, second = (_FakeTraining(Path(path), chosen, n, self._mode).step() for n in (few, 2 * few))
            stored = (second[1] - first[1]) // few
            head, layer = (size - few * stored for size in first)
        return {**whole.facts(), "layers": whole.layers, "stored": stored, "head": head, "layer": layer}


class _FakeTraining:
    """A model of some layers, ready to train, whose tensors have sizes and nothing else."""

    def __init__(self, path: Path, settings: PlanSettings, layers: int | None, mode: FakeTensorMode) -> None:
        self.settings, self.tracker, self.mode = settings, StorageTracker(), mode
        self.head = 0  # bytes at the peak before the backward of the layers
        self.path, self.config = path, _config(path, layers)
        recipe = _recipe(settings)
        model = _skeleton(self.config, recipe, settings.dtype)
        with mode, self.tracker:
            materialize(model, settings)
            self.weights = self.tracker.now
            self.parameters = _values(model)
            self.model = self._adapted(model, recipe)
        self.adapter = sum(parameter.nbytes for parameter in self._trained())
        if settings.method == "full":
            self.adapter = 0

    def _adapted(self, model: PreTrainedModel, recipe: TrainRecipe) -> PreTrainedModel | PeftModel:
        if self.settings.method == "full":
            if self.settings.checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return model.requires_grad_(True)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model = prepare(model, checkpointing=self.settings.checkpointing)
        tokens = NewTokens(ids=tuple(range(self.settings.new_tokens)))  # rows that there are: a few more are no matter
        tuned = add_adapter(model, adapter_config(model, recipe, self.path, tokens.ids), tokens)
        dtype = torch.float32 if self.settings.trained_bytes == 4 else torch.bfloat16
        for module in tuned.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
        if self.settings.checkpointing:
            inner = tuned.get_base_model()
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return tuned

    @property
    def layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    def _trained(self) -> Iterator[Tensor]:
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def facts(self) -> dict[str, int]:
        """Of what lies in memory all the time."""
        return {
            "weights": self.weights,
            "quantization_state": _state_bytes(self.model),
            "adapter": self.adapter,
            "trainable": sum(parameter.numel() for parameter in self._trained()),
            "parameters": self.parameters,
        }

    def step(self) -> tuple[int, int]:
        """Bytes that a step takes beside what lies there: until the loss has its gradient, and from then on.

        Gradients of parameters are given away as they come.
        """
        from trl.trainer.utils import add_fused_lm_head

        model, settings = self.model, self.settings
        inner = model if settings.method == "full" else model.get_base_model()
        add_fused_lm_head(inner, outputs=("log_probs", "entropy", "is_top1"))
        inner.base_model.register_forward_hook(self._watch_states)
        model.train()
        for parameter in self._trained():
            parameter.register_post_accumulate_grad_hook(_give_away)  # type: ignore[no-untyped-call]
        autocast = nullcontext() if settings.on_cpu else torch.autocast("cpu", dtype=getattr(torch, settings.dtype))
        hoisted = AdapterCasts(model, getattr(torch, settings.dtype)).on() if settings.copied_bytes else nullcontext()
        with self.mode, self.tracker:
            self.tracker.restart()
            before = self.tracker.now
            ids = torch.zeros(settings.batch * settings.answers, settings.length, dtype=torch.long)
            mask = torch.ones_like(ids) if settings.padded else None
            with hoisted:
                with autocast:
                    loss = model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True).loss
                    if settings.objective != SFT and settings.method != "full":
                        with torch.no_grad(), model.disable_adapter():  # the reference, beside what the gradient needs
                            model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True)
                loss.backward()
        return self.head - before, self.tracker.peak - before

    def _watch_states(self, body: torch.nn.Module, inputs: object, output: ModelOutput) -> None:
        """Take the peak where the gradient of the last states is there, and begin another one."""

        def split(_: Tensor) -> None:
            self.head = self.tracker.peak
            self.tracker.restart()

        if output.last_hidden_state.requires_grad:  # not of the reference
            output.last_hidden_state.register_hook(split)


def _give_away(parameter: Tensor) -> None:
    parameter.grad = None


def _settings(values: Mapping[str, object]) -> PlanSettings:
    """As they were before they became JSON."""
    problems: list[str] = []
    settings = build(PlanSettings, values, problems)
    assert not problems, problems
    return settings


def _recipe(settings: PlanSettings) -> TrainRecipe:
    """What training would be given."""
    lora = LoraRecipe(
        rank=settings.rank, targets=settings.targets, target_parameters=settings.target_parameters,
        dropout=0.05 if settings.dropout else 0.0, dora=settings.dora,
        modules_to_save=settings.modules_to_save,
    )  # fmt: skip
    quantize: Quantize = "nf4" if settings.method == "qlora" else "none"
    return TrainRecipe(
        method=settings.kind, options=settings.options, lora=lora, quantize=quantize,
        double_quant=settings.double_quant,
    )  # fmt: skip


def _config(path: Path, layers: int | None) -> PretrainedConfig:
    """The model's config, of its first ``layers`` layers where they are named."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    config.use_cache = False
    text = config.get_text_config()
    count = text.num_hidden_layers
    if layers is not None:
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == count:
                setattr(text, name, value[:layers])
        text.num_hidden_layers = layers
    return config


def _few_layers(config: PretrainedConfig) -> int:
    """How many of the first layers have every kind of them."""
    kinds = list(getattr(config.get_text_config(), "layer_types", None) or [""])
    return min(MOST_KINDS, max(kinds.index(kind) for kind in set(kinds)) + 1)


def _skeleton(config: PretrainedConfig, recipe: TrainRecipe, dtype: ComputeType) -> PreTrainedModel:
    """The class that training loads, on the meta device, its linear layers replaced where it is quantized."""
    with torch.device("meta"):
        model = weightless_language_model(config, dtype=getattr(torch, dtype))
    return quantize(model, four_bit(recipe, dtype)) if recipe.quantize != "none" else model


def _state_bytes(model: torch.nn.Module) -> int:
    """Of what lies beside 4-bit codes."""
    states = [state for weight in model.parameters() if (state := getattr(weight, "quant_state", None)) is not None]
    levels = [level for state in states for level in (state, state.state2) if level is not None]
    parts = [part for level in levels for part in (level.absmax, level.code, level.offset) if part is not None]
    return sum({id(part): int(part.nbytes) for part in parts}.values())


def _values(model: PreTrainedModel) -> int:
    """Of all parameters, a packed one counted by its shape."""
    return sum(
        parameter.quant_state.shape.numel() if hasattr(parameter, "quant_state") else parameter.numel()
        for parameter in model.parameters()
    )
