"""The closed form beside the real code on fake tensors, and beside two real steps of the demo."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lora2serve.api.exact_planning import exact_planner
from lora2serve.planning.memory_plan import planned_bytes
from lora2serve.planning.model_shape import ModelShape, model_shape
from lora2serve.planning.plan_settings import PlanSettings
from lora2serve.training.weightless import weightless_of
from lora2serve.weights.tensors import TensorSpec
from tests.planning.conftest import LLAMA3_8B, LLAMA3_70B, TINYLLAMA, write_config

pytestmark = pytest.mark.engine

QWEN3 = {
    "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
PHI3 = {
    "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "pad_token_id": 0,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = [
    (TINYLLAMA, PlanSettings(batch=4)),
    (TINYLLAMA, PlanSettings(batch=1, length=4096, padded=False)),
    (TINYLLAMA, PlanSettings("lora", batch=4)),
    (TINYLLAMA, PlanSettings("lora", batch=4, checkpointing=False)),
    (TINYLLAMA, PlanSettings(batch=4, dropout=True)),
    (TINYLLAMA, PlanSettings("full", batch=4)),
    (TINYLLAMA, PlanSettings(batch=4, dtype="float16")),
    (TINYLLAMA, PlanSettings(batch=4, dtype="float32")),
    (TINYLLAMA, PlanSettings(batch=4, targets="qv")),
    (LLAMA3_8B, PlanSettings("lora", 8, batch=2, length=2048, trained_bytes=2)),
    (LLAMA3_70B, PlanSettings(batch=1, length=2048, padded=False)),
    (QWEN3, PlanSettings(batch=2)),
    (PHI3, PlanSettings(batch=2)),
    (TINYLLAMA, PlanSettings(batch=2, new_tokens=3)),  # rows of embedding and head
    (QWEN3, PlanSettings(batch=1, new_tokens=2)),  # which are tied
    (TINYLLAMA, PlanSettings(batch=2, objective="dpo")),  # whose reference keeps nothing
]
SLOW = pytest.mark.slow
CASES = [pytest.param(*case, marks=SLOW if number else ()) for number, case in enumerate(SHAPES)]


@pytest.mark.parametrize(("config", "settings"), CASES)
def test_both_ways_agree(tmp_path: Path, config: dict[str, object], settings: PlanSettings) -> None:
    path = write_config(tmp_path / "model", config)
    with exact_planner() as planner:
        exact = planner.measure(path, settings, 1.0)
    closed = planned_bytes(model_shape(config, None), settings)
    assert closed.tensors == pytest.approx(exact.bytes.tensors, rel=0.05)
    assert closed.weights + closed.quantization_state == pytest.approx(
        exact.bytes.weights + exact.bytes.quantization_state, rel=1e-4
    )
    assert closed.adapter == exact.bytes.adapter and closed.quantization_state == exact.bytes.quantization_state


QWEN3_30B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip


def model_of(config: dict[str, object]) -> ModelShape:
    """The shape of a mixture of experts, whose tensors are not all known from its config."""
    from transformers import AutoConfig

    skeleton = weightless_of(AutoConfig.for_model(**config))
    specs = [TensorSpec(name, tuple(tensor.shape), "BF16") for name, tensor in skeleton.state_dict().items()]
    return model_shape(config, specs)


@pytest.mark.slow
def test_experts(tmp_path: Path) -> None:
    """Qwen3-30B-A3B under 24 GB: its experts are in 4 bits, with a LoRA on each of them or without."""
    path, shape = write_config(tmp_path / "moe", QWEN3_30B), model_of(QWEN3_30B)
    plain = PlanSettings(batch=1, length=2048, targets="attention")
    with exact_planner() as planner:
        for settings in (plain, replace(plain, target_parameters="experts", rank=8)):
            exact, closed = planner.measure(path, settings, 1.0), planned_bytes(shape, settings)
            assert closed.quantization_state == exact.bytes.quantization_state
            assert closed.weights == pytest.approx(exact.bytes.weights, rel=1e-4)
            assert closed.adapter == exact.bytes.adapter
            assert closed.tensors == pytest.approx(exact.bytes.tensors, rel=0.1)
            assert settings.target_parameters or exact.bytes.total < 24e9


@pytest.mark.slow
def test_dora(tmp_path: Path) -> None:
    """What the closed form does not know: it keeps whole weights for its norms."""
    dora = PlanSettings(batch=4, dora=True)
    with exact_planner() as planner:
        normed = planner.measure(write_config(tmp_path / "dora", TINYLLAMA), dora, 1.0)
    closed = planned_bytes(model_shape(TINYLLAMA, None), dora)
    assert closed.adapter == normed.bytes.adapter and closed.activations < 0.5 * normed.bytes.activations


TWO_STEPS = """
import json, sys
from pathlib import Path
import torch
from transformers import Trainer, TrainerCallback, trainer
from lora2serve.training.storage_tracker import StorageTracker

tracker = StorageTracker()

class Watch(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **_):
        for module in model.modules():
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                if tensor is not None:
                    tracker.add(tensor.data)
                    packed = getattr(tensor, "quant_state", None)
                    for level in (packed, packed and packed.state2):
                        if level is not None:
                            for part in (level.absmax, level.code, level.offset):
                                if part is not None:
                                    tracker.add(part)
        tracker.restart()
        tracker.__enter__()

    def on_train_end(self, *_, **__):
        tracker.__exit__(None, None, None)

trainer.DEFAULT_CALLBACKS.append(Watch)
import lora2serve
lora2serve.train(sys.argv[1])
print(json.dumps(tracker.peak))
"""


@pytest.mark.parametrize("checkpointing", [True, False])
def test_two_real_steps_of_the_demo(tmp_path: Path, checkpointing: bool) -> None:
    """On real tensors, by every storage that is alive: the plan is within 3 % of its peak."""
    rows = [json.dumps({"text": "word " * 400}) for _ in range(32)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    base = Path(__file__).parents[2] / "recipes" / "demo" / "base"
    recipe = {
        "model": {"path": str(base)},
        "data": {"train": "rows.jsonl", "max_length": 128},
        "train": {"steps": 2, "batch_size": 16, "gradient_checkpointing": checkpointing},
    }
    (tmp_path / "two.yaml").write_text(json.dumps(recipe))
    done = subprocess.run(
        [sys.executable, "-c", TWO_STEPS, "two.yaml"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    peak = json.loads(done.stdout.splitlines()[-1])
    from lora2serve.weights.checkpoint import Checkpoint

    checkpoint = Checkpoint(base)
    shape = model_shape(checkpoint.config, checkpoint.specs())
    settings = PlanSettings(batch=16, length=128, dtype="float32", padded=False, checkpointing=checkpointing)
    assert planned_bytes(shape, settings).tensors == pytest.approx(peak, rel=0.03)
    assert planned_bytes(shape, replace(settings, batch=12)).tensors < 0.9 * peak, "the control: fewer rows"
