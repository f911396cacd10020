"""What is read of a model: its linear layers and the rest, from headers or from config.json, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora2serve.errors import CheckpointError
from lora2serve.planning.model_shape import model_shape
from lora2serve.planning.plan_settings import PlanSettings
from lora2serve.planning.static_memory import static_memory
from lora2serve.weights.checkpoint import Checkpoint
from tests.planning.conftest import LLAMA3_405B, write_config
from tests.support.tiny import make_model


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "phi3", "gpt2", "mixtral"])
def test_headers_and_the_model_itself(tmp_path: Path, kind: str) -> None:
    """Every value is counted once, and the linear layers are those of the model."""
    from transformers import AutoModelForCausalLM

    from lora2serve.training.lora_targets import linear_modules

    path = make_model(tmp_path / kind, kind, head_dim=16) if kind != "gpt2" else make_model(tmp_path / kind, kind)
    checkpoint = Checkpoint(path)
    shape = model_shape(checkpoint.config, checkpoint.specs())
    model = AutoModelForCausalLM.from_pretrained(path)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    linears = {name: tuple(model.get_submodule(name).weight.shape) for name in linear_modules(model)}
    if kind == "gpt2":
        linears = {name: shape[::-1] for name, shape in linears.items()}
    suffixes = {linear.path.removeprefix("model.").removeprefix("transformer.") for linear in shape.linears}
    assert suffixes == {name.removeprefix("model.").removeprefix("transformer.") for name in linears}
    assert sorted((item.outputs, item.inputs) for item in shape.linears) == sorted(linears.values())
    assert bool(shape.experts) == (kind == "mixtral")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "gemma"])
def test_config_alone(tmp_path: Path, kind: str) -> None:
    """Of decoders that are built like Llama it says as much as headers do, but for small norms and biases."""
    checkpoint = Checkpoint(make_model(tmp_path / kind, kind, head_dim=16))
    known, guessed = model_shape(checkpoint.config, checkpoint.specs()), model_shape(checkpoint.config, None)
    assert sorted(known.linears, key=str) == sorted(guessed.linears, key=str)
    assert guessed.parameters == pytest.approx(known.parameters, rel=0.002)
    with pytest.raises(CheckpointError, match="a model of type 'mamba' without the headers"):
        model_shape({**checkpoint.config, "model_type": "mamba"}, None)


@pytest.mark.parametrize("double_quant", [True, False])
def test_weights_to_the_byte(tmp_path: Path, double_quant: bool) -> None:
    """Beside what bitsandbytes makes of the model: every storage of its parameters and of their state, once."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    path = make_model(tmp_path / "base", "llama", hidden_size=96, intermediate_size=328, vocab_size=131)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16)
    storages: dict[int, int] = {}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        parts = [parameter.data]
        for level in (state, state and state.state2):
            parts += [level.absmax, level.code, *([level.offset] if level.offset is not None else [])] if level else []
        storages |= {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    checkpoint = Checkpoint(path)
    shape = model_shape(checkpoint.config, checkpoint.specs())
    planned = static_memory(shape, PlanSettings(double_quant=double_quant))
    assert planned.weights + planned.quantization_state == sum(storages.values())
    other = static_memory(shape, PlanSettings(double_quant=not double_quant))
    assert other.weights + other.quantization_state != sum(storages.values())


def test_405b_without_torch(tmp_path: Path) -> None:
    """Which takes a second to load, and more memory than the plan of any model."""
    path = write_config(tmp_path / "405b", LLAMA3_405B)
    script = (
        "import json, sys, lora2serve; plan = lora2serve.plan(sys.argv[1], gpu='h100', methods=['qlora']);"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'));"
        "print(json.dumps(['torch' in sys.modules, plan.parameters, int(peak.split()[1])]))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    torch_is_there, parameters, kilobytes = json.loads(done.stdout)
    assert not torch_is_there and kilobytes < 150_000
    assert parameters == pytest.approx(405.85e9, rel=0.001)
