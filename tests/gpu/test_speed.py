"""What only a GPU has: the kernel of varlen attention, compiled layers in 16 bits, fused AdamW. All short."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from lora2serve.training.adapter_casts import AdapterCasts
from lora2serve.training.layer_compilation import CompiledLayers
from lora2serve.training.packing import attend_by_document
from lora2serve.training.varlen_attention import apart
from tests.training.test_packing import documents
from tests.training.test_steps import batch, furthest, gradients, tuned

LENGTHS = (170, 400, 30, 250)
KINDS = ("llama", "qwen3", "gemma3_text", "mistral", "phi3")
SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64,
                         "max_position_embeddings": 1024}  # fmt: skip


def on_gpu(kind: str) -> Any:
    """A base in bfloat16 with an adapter in float32."""
    model = tuned(kind, checkpointing=True, **SHAPE).to("cuda")
    for name, weight in model.named_parameters():
        weight.data = weight.data.float() if "lora_" in name else weight.data.bfloat16()
    return model


def stepped(model: Any, whole: dict[str, Any], *around: Any) -> dict[str, Tensor]:
    inputs = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in whole.items()}
    inputs.pop("padding", None)
    with ExitStack() as stack:
        for each in around:
            stack.enter_context(each())
        with torch.autocast("cuda", torch.bfloat16):
            loss = -model(**inputs, use_cache=False, fused_lm_head=True).log_probs.sum() / 100
        loss.backward()
    return gradients(model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_of_varlen_attention(kind: str) -> None:
    """Beside padded rows, within what 16 bits round; one document instead of four is the control."""
    model = on_gpu(kind)
    padded = stepped(model, batch(*LENGTHS))
    assert attend_by_document(model, documents(30, 9, 21))
    assert furthest(stepped(model, batch(*LENGTHS, free=True, multiple=64), apart), padded) < 0.03
    assert furthest(stepped(model, batch(sum(LENGTHS), free=True), apart), padded) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers_with_all_else(kind: str) -> None:
    """Varlen attention and hoisted casts in one graph, without a break, for other lengths too."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = on_gpu(kind)
    assert attend_by_document(model, documents(30, 9, 21))
    casts, layers = AdapterCasts(model, torch.bfloat16), CompiledLayers(model.get_base_model())
    for lengths in (LENGTHS, (90, 90, 300), (1000,)):
        whole = batch(*lengths, free=True, multiple=64)
        whole |= {"max_length_q": 1000, "max_length_k": 1000}
        plain = stepped(model, whole, apart)
        assert furthest(stepped(model, whole, apart, casts.on, layers.on), plain) < 0.03
    kinds = len(set(getattr(model.config, "layer_types", None) or ["full_attention"]))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= kinds + 2


def test_hoisted_casts_are_autocasts() -> None:
    model = on_gpu("llama")
    whole = batch(*LENGTHS)
    assert furthest(stepped(model, whole, AdapterCasts(model, torch.bfloat16).on), stepped(model, whole)) == 0
