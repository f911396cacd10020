"""The closed form beside measured peaks on a Tesla T4: the archive of fitcheck-llm 0.3.1 (PyPI, MIT), its rows with SDPA.

They were measured with the full logits of a model, which training has not: 4 float32 copies beside a 4-bit base, 3.5
beside one in 16 bits. So what the plan says of all else is held here: weights, 4-bit state, adapter, moments,
and what checkpointing keeps. Rank 32 (16 in the last runs) on the four matrices of attention, float16, in MiB.
"""

from __future__ import annotations

import pytest

from lora2serve.planning.activations import activation_memory
from lora2serve.planning.model_shape import model_shape
from lora2serve.planning.plan_settings import PlanSettings
from lora2serve.planning.static_memory import static_memory

KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
MODELS = {
    "deepseek-coder-1.3b": ("llama", 2048, 5504, 24, 16, 16, 32256, False),
    "Mistral-7B": ("llama", 4096, 14336, 32, 32, 8, 32768, False),
    "Qwen2.5-Coder-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-7B": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "Llama-3.2-3B": ("llama", 3072, 8192, 28, 24, 8, 128256, True),
    "Llama-3.2-1B": ("llama", 2048, 8192, 16, 32, 8, 128256, True),
    "Qwen2.5-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "SmolLM2-1.7B": ("llama", 2048, 8192, 24, 32, 32, 49152, True),
    "TinyLlama-1.1B": ("llama", 2048, 5632, 22, 32, 4, 32000, False),
    "SmolLM2-135M": ("llama", 576, 1536, 30, 9, 3, 49152, True),
    "SmolLM2-360M": ("llama", 960, 2560, 32, 15, 5, 49152, True),
}
ROWS = [
    ("deepseek-coder-1.3b", "nf4", 16, 1, 1024, 1972),
    ("Mistral-7B", "nf4", 16, 1, 1024, 6056),
    ("Qwen2.5-Coder-1.5B", "nf4", 16, 1, 1024, 4235),
    ("Qwen2.5-7B", "nf4", 16, 1, 1024, 10586),
    ("Llama-3.2-3B", "nf4", 16, 1, 1024, 5495),
    ("Llama-3.2-1B", "nf4", 16, 1, 1024, 3723),
    ("Qwen2.5-1.5B", "nf4", 32, 1, 2048, 6831),
    ("Qwen2.5-1.5B", "none", 32, 1, 2048, 7402),
    ("SmolLM2-1.7B", "nf4", 32, 1, 2048, 3346),
    ("SmolLM2-1.7B", "none", 32, 1, 2048, 4977),
    ("TinyLlama-1.1B", "nf4", 32, 1, 1024, 1843),
    ("TinyLlama-1.1B", "nf4", 32, 12, 1024, 9372),
    ("TinyLlama-1.1B", "nf4", 32, 2, 1024, 2530),
    ("TinyLlama-1.1B", "nf4", 32, 4, 1024, 3896),
    ("TinyLlama-1.1B", "nf4", 32, 8, 1024, 6632),
    ("Qwen2.5-1.5B", "nf4", 32, 2, 1024, 6828),
    ("Qwen2.5-1.5B", "none", 32, 2, 1024, 7402),
    ("SmolLM2-1.7B", "nf4", 32, 4, 1024, 5281),
    ("SmolLM2-1.7B", "none", 32, 4, 1024, 6529),
    ("SmolLM2-135M", "nf4", 32, 1, 4096, 3577),
    ("SmolLM2-135M", "none", 32, 1, 4096, 3148),
    ("SmolLM2-135M", "nf4", 32, 2, 512, 1064),
    ("SmolLM2-135M", "none", 32, 2, 512, 1027),
    ("SmolLM2-360M", "nf4", 32, 1, 4096, 4018),
    ("SmolLM2-360M", "none", 32, 1, 4096, 3755),
    ("TinyLlama-1.1B", "none", 32, 2, 1024, 3288),
    ("TinyLlama-1.1B", "nf4", 32, 2, 2048, 3896),
    ("TinyLlama-1.1B", "none", 32, 2, 2048, 4354),
    ("TinyLlama-1.1B", "nf4", 32, 2, 512, 1849),
    ("TinyLlama-1.1B", "none", 32, 2, 512, 2756),
]  # model, weights, rank, rows, tokens of each, peak


def planned(name: str, quantization: str, rank: int, rows: int, length: int) -> float:
    """MiB at the moment of the logits."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    settings = PlanSettings(
        "qlora" if quantization == "nf4" else "lora", rank, targets, batch=rows, length=length, double_quant=False,
        dtype="float16", padded=False, hoisted=False,
    )  # fmt: skip
    shape = model_shape(dict(zip(KEYS, MODELS[name], strict=True)), None)
    held = static_memory(shape, settings)
    logits = (4 if quantization == "nf4" else 3.5) * 4 * rows * length * shape.vocabulary
    states = held.weights + held.quantization_state + held.adapter + held.optimizer
    return (states + activation_memory(shape, settings).stored + logits) / (1 << 20)


@pytest.mark.parametrize(("name", "quantization", "rank", "rows", "length", "peak"), ROWS)
def test_measured_peaks(name: str, quantization: str, rank: int, rows: int, length: int, peak: int) -> None:
    share = planned(name, quantization, rank, rows, length) / peak
    assert 0.97 <= share <= 1.05
    assert planned(name, quantization, rank, 2 * rows, length) / peak > 1.05, "the control: twice the rows"
