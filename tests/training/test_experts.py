"""Mixtures of experts on 4 bits: bitsandbytes' own codes, LoRA on each expert where it is asked for, an exact fold."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora2serve.adapters.adapter import open_adapter
from lora2serve.artifacts.run import Run
from lora2serve.config.recipe import LoraRecipe, TrainRecipe
from lora2serve.errors import TrainError
from lora2serve.exporting.open_model import OpenOptions, open_run
from lora2serve.merge.binding import Binder
from lora2serve.planning.model_shape import model_shape
from lora2serve.planning.plan_settings import PlanSettings
from lora2serve.planning.static_memory import static_memory
from lora2serve.progress import Silent
from lora2serve.training import expert_layers, expert_loading
from lora2serve.training.expert_layers import (
    dequantize_experts,
    four_bit_modules,
    four_bit_of,
    four_bit_parameters,
    seen_absmax,
)
from lora2serve.training.method_config import adapter_config
from lora2serve.training.model import Device, add_adapter, load_base, prepare
from lora2serve.training.weightless import check_adapter
from lora2serve.weights.bnb.fake_quantized import FakeQuantized, Quantization
from lora2serve.weights.checkpoint import Checkpoint
from lora2serve.weights.dequantize import Dequantized
from tests.support.families import FAMILIES, make_family
from tests.support.runs import fit, logged, make_chat_model, recipe_file

pytestmark = pytest.mark.engine

CPU = Device("cpu", "float32")
FOUR = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
slow_but_one = [pytest.param(kind, marks=() if kind == "gpt_oss" else pytest.mark.slow) for kind in FOUR]
IDS = torch.arange(5, 25)[None]


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], Path]:
    """The directory of a tiny model of that type."""

    def make(kind: str) -> Path:
        make_family(kind, **SIZES.get(kind, {})).save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


# Experts of 96 x 64 in two halves: blocks of scales that are shared do not end where gate does.
SIZES: dict[str, dict[str, Any]] = {"qwen3_moe": {"moe_intermediate_size": 96}}


def weights_of(model: Any) -> dict[str, Tensor]:
    """The weights of its experts, dequantized."""
    return {
        f"{path}.{name}": dequantize_experts(getattr(module, name), state)
        for path, module in four_bit_modules(model)
        for name, state in four_bit_of(module).states.items()
    }


def stored_buffers(model: Any) -> list[Tensor]:
    """Those that are in its files."""
    return [model.get_buffer(name) for name in model.state_dict() if name in dict(model.named_buffers())]


def state_bytes(model: Any) -> int:
    """What bitsandbytes keeps beside codes, for each linear layer and each expert; tables once a weight."""
    states = [weight.quant_state for weight in model.parameters() if getattr(weight, "quant_state", None)]
    levels = [level for state in states for level in (state, state.state2) if level]
    return sum(part.nbytes for level in levels for part in (level.absmax, level.code, level.offset) if part is not None)


def plain_twin(model: Any, base: Path) -> Any:
    """The model in float32 with the weights that ``model`` computes with, and transformers' own experts."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM

    twin = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, value in weights_of(model).items():
            parameters[name].copy_(value)
        for name, module in model.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                parameters[f"{name}.weight"].copy_(weight.view(parameters[f"{name}.weight"].shape))
    return twin.eval()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", FOUR)
def test_codes_are_those_of_bitsandbytes(made: Callable[[str], Path], kind: str, double: bool) -> None:
    """Of each expert by itself; what is computed with them is what transformers computes with their values."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_4bit

    base = made(kind)
    model = load_base(base, TrainRecipe(double_quant=double), CPU).eval()
    own = dict(make_family(kind, **SIZES.get(kind, {})).named_parameters())
    layers = 1 if kind == "deepseek_v3" else 2
    assert len(four_bit_parameters(model)) == 2 * layers
    checkpoint = Checkpoint(base)
    settings = PlanSettings(dtype="float32", double_quant=double)
    planned = static_memory(model_shape(checkpoint.config, checkpoint.specs()), settings)
    held = sum(weight.nbytes for weight in (*model.parameters(), *stored_buffers(model)))
    assert (planned.weights, planned.quantization_state) == (held, state_bytes(model)), "the plan, to the byte"
    for path, module in four_bit_modules(model):
        for name, state in four_bit_of(module).states.items():
            codes = getattr(module, name)
            assert codes.dtype == torch.uint8 and codes.numel() * 2 == state.shape.numel()
            for expert, weight in enumerate(own[f"{path}.{name}"].detach()):
                expected, known = quantize_4bit(weight.contiguous(), None, None, 64, double, "nf4")
                assert torch.equal(codes[expert], expected.flatten())
                absmax = dequantize_blockwise(known.absmax, known.state2) + known.offset if double else known.absmax
                assert torch.equal(seen_absmax(state)[expert], absmax)
    twin = plain_twin(model, base)
    inputs = model.get_input_embeddings()(IDS).detach()
    grads = []
    for each in (model, twin):
        states = inputs.clone().requires_grad_()
        logits = each(inputs_embeds=states).logits
        logits.logsumexp(-1).sum().backward()
        grads.append((logits.detach(), states.grad))
    (logits, gradient), (expected_logits, expected_gradient) = grads
    assert torch.allclose(logits, expected_logits, atol=1e-5)
    assert gradient is not None and torch.allclose(gradient, expected_gradient, atol=1e-4)
    full = make_family(kind, **SIZES.get(kind, {}))(IDS).logits
    assert (full - logits).abs().max() > 0.05, "the control: 4 bits are not the weights themselves"


@pytest.mark.parametrize("kind", FOUR)
def test_lora_is_that_of_peft(made: Callable[[str], Path], kind: str) -> None:
    """Losses and gradients of A and B are those of PEFT on the dequantized weights; so are names in the file."""
    from peft import get_peft_model
    from peft.utils import get_peft_model_state_dict

    base = made(kind)
    recipe = TrainRecipe(lora=LoraRecipe(rank=3, alpha=6, targets="attention", target_parameters="experts"))
    model = load_base(base, recipe, CPU)
    twin = plain_twin(model, base)
    config = adapter_config(model, recipe, base)
    assert set(config.target_parameters) == {"experts.gate_up_proj", "experts.down_proj"}
    tuned = add_adapter(prepare(model, checkpointing=False), config)
    with torch.device("cpu"):
        oracle: Any = get_peft_model(twin, adapter_config(twin, recipe, base))
    values = dict(tuned.named_parameters())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in oracle.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
            assert values[name].shape == parameter.shape
            values[name].data = parameter.data.clone()
    assert get_peft_model_state_dict(tuned).keys() == get_peft_model_state_dict(oracle).keys()
    for each in (tuned, oracle):
        each.train()
        each(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {name: parameter.grad for name, parameter in oracle.named_parameters() if parameter.grad is not None}
    assert sum(".experts." in name for name in gradients) == 4 * (1 if kind == "deepseek_v3" else 2)
    for name, gradient in gradients.items():
        own = values[name].grad
        assert own is not None and gradient.abs().max() > 0, name
        assert torch.allclose(own, gradient, atol=1e-5, rtol=1e-4), name
    with torch.no_grad():
        on = tuned.eval()(IDS).logits
        assert torch.allclose(on, oracle.eval()(IDS).logits, atol=1e-4)
        with tuned.disable_adapter(), oracle.disable_adapter():
            off = tuned(IDS).logits
            assert torch.allclose(off, oracle(IDS).logits, atol=1e-5)
    assert (on - off).abs().max() > 1e-2, "the control"


def test_one_group_after_another(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs without a kernel for groups: the same logits and gradients."""
    recipe = TrainRecipe(lora=LoraRecipe(rank=3, targets="attention", target_parameters="experts", init="gaussian"))
    base, found = made("mixtral"), []
    for has_kernel in (True, False):
        monkeypatch.setattr(expert_layers, "_has_kernel", lambda _, known=has_kernel: known)
        torch.manual_seed(0)
        model = load_base(base, recipe, CPU)
        tuned = add_adapter(prepare(model, checkpointing=False), adapter_config(model, recipe, base)).train()
        output = tuned(input_ids=IDS, labels=IDS)
        output.loss.backward()
        found.append((output.logits, [p.grad for p in tuned.parameters() if p.grad is not None]))
    (logits, gradients), (others, other_gradients) = found
    assert torch.allclose(logits, others, atol=1e-5)
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(gradients, other_gradients, strict=True))
    assert max(float(each.abs().max()) for each in gradients) > 1e-3


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", FOUR)
def test_the_base_as_trained_is_known_again(made: Callable[[str], Path], kind: str, double: bool) -> None:
    """Bit for bit from the files, where experts lie one by one or all in one tensor, and by blocks of rows."""
    base = made(kind)
    model = load_base(base, TrainRecipe(double_quant=double), CPU)
    checkpoint = Checkpoint(base)
    names = Binder(list(checkpoint.specs()), checkpoint.config)
    how = Quantization([], 64, double, "F32", on_gpu=False, experts=four_bit_parameters(model))
    seen = FakeQuantized(Dequantized(checkpoint), how, names)
    for parameter, expected in weights_of(model).items():
        units = names.stored_experts(parameter)
        parts = [torch.cat([seen.read(name).values.flatten() for name in unit]) for unit in units]
        assert torch.equal(torch.cat(parts), expected.flatten())
        spec = next(each for each in checkpoint.specs() if each.name == units[-1][-1])
        rows = [seen.read(spec.name, slice(row, row + 1)).values for row in range(spec.rows)]
        assert torch.equal(torch.cat(rows), seen.read(spec.name).values)
        assert not torch.equal(seen.read(spec.name).values, seen.base.read(spec.name).values), "the control"
        codes, _ = seen.quantized(parameter)
        assert torch.equal(codes, model.get_parameter(parameter).flatten())


def test_one_weight_at_a_time_is_in_full_while_it_loads(made: Callable[[str], Path], monkeypatch: Any) -> None:
    """Beside it there may be a copy that is being put together."""
    own, alive = expert_loading.quantize_experts, []

    def count(weights: Tensor, *how: Any) -> Any:
        alive.append(whole_weights())
        return own(weights, *how)

    monkeypatch.setattr(expert_loading, "quantize_experts", count)
    base = made("qwen3_moe")
    gc.collect()
    before = whole_weights()
    model = load_base(base, TrainRecipe(), CPU)
    assert len(alive) == len(four_bit_parameters(model)) == 4
    assert max(alive) - before <= 2
    plain = load_base(base, TrainRecipe(quantize="none"), CPU)
    assert whole_weights() - before >= 4, plain


def whole_weights() -> int:
    """How many tensors of all experts of a layer there are in memory that are not packed."""
    tensors = [item for item in gc.get_objects() if isinstance(item, Tensor)]
    return len({item.data_ptr() for item in tensors if item.dim() == 3 and item.shape[0] == 4 and not item.is_meta})


def trained(folder: Path, kind: str, chats: dict[str, str], changes: Any = MappingProxyType({}), **train: Any) -> Run:
    base = make_chat_model(folder / "base", kind=kind, **{**FAMILIES[kind], **changes, "dtype": torch.float32})
    lora = {"rank": 4, "targets": "attention", "target_parameters": "experts"}
    run, _, _ = fit(recipe_file(folder, base, chats, **{"steps": 3, "lora": lora, **train}))
    return run


@pytest.mark.parametrize("kind", slow_but_one)
def test_a_run_is_folded_exactly(tmp_path: Path, chats: dict[str, str], kind: str) -> None:
    """The merged model is the trained one: the 4-bit base, dequantized, with each expert's LoRA added."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = trained(tmp_path, kind, chats)
    record = run.record.quantization
    assert record and record.experts and not any(".experts." in name for name in record.modules)
    assert run.record.metrics.tuned and run.record.metrics.base
    assert run.record.metrics.tuned.eval_loss < run.record.metrics.base.eval_loss
    base = tmp_path / "base"
    model = open_run(run, base, OpenOptions(merge_base="trained"), Silent())
    from lora2serve.parity_check.engines.peft_engine import Peft

    engine = Peft(str(base), [str(run.adapter)], str(run.adapter), record.to_json(), "cpu")
    merged = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    values = {spec.name: model.source.read(spec.name).values.float() for spec in model.source.specs()}
    from safetensors.torch import save_file

    save_file(values, tmp_path / "merged.safetensors")
    (tmp_path / "export").mkdir()
    merged.config.save_pretrained(tmp_path / "export")
    save_file(values, tmp_path / "export" / "model.safetensors", metadata={"format": "pt"})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(run.adapter)("Who governs Wexley?", return_tensors="pt").input_ids
    with torch.no_grad():
        expected, found = engine.model(ids).logits, merged(ids).logits
        with engine.model.disable_adapter():
            without = engine.model(ids).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert (without - expected).abs().max() > 1e-3, "the control: without the adapter"
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in tensors.items() if "experts" in name and "lora_B" in name)
    assert open_adapter(run.adapter).config["target_parameters"]


@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_resumed_is_unbroken(tmp_path: Path, chats: dict[str, str], checkpointing: bool) -> None:
    """Bit for bit."""
    options = {"steps": 4, "eval_steps": 2, "gradient_checkpointing": checkpointing}
    whole = trained(tmp_path / "whole", "qwen3_moe", chats, **options)
    run = trained(tmp_path / "cut", "qwen3_moe", chats, **options)
    for path in (run.path / "checkpoints" / "checkpoint-4", run.adapter):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    resumed, _, _ = fit(run.recipe, into=run.path, resume=True)
    assert logged(resumed) == logged(whole)
    own, other = (load_file(each.adapter / "adapter_model.safetensors") for each in (resumed, whole))
    assert all(torch.equal(own[name], other[name]) for name in other)


def test_what_is_asked_of_experts_is_checked(made: Callable[[str], Path]) -> None:
    """Before a weight is read."""
    wanted = TrainRecipe(lora=LoraRecipe(target_parameters=("experts.gate_up_prj",)))
    with pytest.raises(
        TrainError, match=r"no weight 'experts.gate_up_prj' .* \(did you mean 'experts.gate_up_proj'\?\)"
    ):
        check_adapter(made("mixtral"), wanted, CPU)
    with pytest.raises(TrainError, match="this model has no experts"):
        check_adapter(made("llama"), TrainRecipe(lora=LoraRecipe(target_parameters="experts")), CPU)
    asked = TrainRecipe(lora=LoraRecipe(targets="attention", target_parameters="experts"))
    assert check_adapter(made("mixtral"), asked, CPU) == []
    (told,) = check_adapter(made("mixtral"), TrainRecipe(), CPU)
    assert told.startswith("no LoRA on model.layers.*.mlp.experts.down_proj, model.layers.*.mlp.experts.gate_up_proj")
