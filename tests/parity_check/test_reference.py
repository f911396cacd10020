"""The model as trained, on a machine that is not the one that trained it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from lora2serve.parity_check.engines.peft_engine import Peft
from lora2serve.parity_check.engines.transformers_engine import device
from lora2serve.weights.bnb.fake_quantized import FakeQuantized, Quantization
from lora2serve.weights.checkpoint import Checkpoint
from lora2serve.weights.dequantize import Dequantized
from tests.support.runs import make_chat_model

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("double", [True, False])
def test_codes_are_those_of_the_device_that_trained(tmp_path: Path, double: bool) -> None:
    base = make_chat_model(tmp_path / "base")
    source = Dequantized(Checkpoint(base))
    modules = [spec.name.removesuffix(".weight") for spec in source.specs() if "_proj" in spec.name]
    quantization = {
        "type": "nf4",
        "double_quant": double,
        "block_size": 64,
        "compute_dtype": "bfloat16",
        "modules": modules,
    }
    here = device()
    differ = 0
    for trained_on in ("cuda", "cpu"):
        engine = Peft(str(base), [], str(base), quantization, trained_on)
        trip = FakeQuantized(source, Quantization.of({"quantization": quantization, "device": trained_on}))
        changed = {**quantization, "double_quant": not double}
        other = FakeQuantized(source, Quantization.of({"quantization": changed, "device": trained_on}))
        for name in modules:
            weight = engine.model.get_submodule(name).weight
            seen = dequantize_4bit(weight.data, weight.quant_state).cpu()
            if trained_on == here:  # untouched: bitsandbytes' own, bfloat16
                assert seen.dtype == torch.bfloat16
            assert torch.equal(trip.read(f"{name}.weight").values.to(seen.dtype), seen), name
            differ += int((other.read(f"{name}.weight").values.to(seen.dtype) != seen).sum())
        scores = list(engine.score([[1, 2, 3, 4]]))
        assert torch.isfinite(torch.from_numpy(scores[0].values)).all()
    assert differ, "the control: with scales that are quantized the other way, the weights are others"
