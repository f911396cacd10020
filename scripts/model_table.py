"""Write the table of docs/models.md: which models the tests export to which target (`make docs`).

Read from the parametrized tests themselves, so that a row says what is run and nothing else.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- written by scripts/model_table.py -->\n", "<!-- end -->\n"
COLUMNS = ("merge", "quantized", "gguf", "gguf-adapter")
LABELS = {
    "llama": "Llama 2 and 3, SmolLM2",
    "mistral": "Mistral",
    "ministral3": "Ministral 3",
    "mixtral": "Mixtral",
    "qwen2": "Qwen 2 and 2.5",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3": "Qwen 3",
    "qwen3_moe": "Qwen3-MoE",
    "qwen3_next": "Qwen3-Next",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3, text",
    "gemma3": "Gemma 3, with images",
    "mistral3": "Mistral Small 3, with images",
    "phi": "Phi-2",
    "phi3": "Phi-3, 3.5 and 4",
    "smollm3": "SmolLM3",
    "granite": "Granite",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "gpt_oss": "gpt-oss",
    "deepseek_v2": "DeepSeek-V2",
    "stablelm": "StableLM",
    "falcon": "Falcon",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX",
    "starcoder2": "StarCoder2",
    "cohere": "Command R",
    "mamba2": "Mamba-2",
}


def cases(test: Callable[..., None], name: str) -> Iterator[str]:
    """The values that a parametrized test is run with."""
    for mark in test.pytestmark:  # type: ignore[attr-defined]
        names, values = mark.args
        names = [part.strip() for part in names.split(",")] if isinstance(names, str) else list(names)
        if name in names:
            for value in values:  # a string, a tuple, or a pytest.param with one of them in it
                items = (
                    value
                    if isinstance(value, tuple) and not hasattr(value, "marks")
                    else getattr(value, "values", value)
                )
                yield items if isinstance(items, str) else items[names.index(name)]


def tested() -> dict[str, dict[str, str]]:
    """``model_type`` -> column -> what the cell says."""
    from tests.converters import test_compressed, test_gguf_families, test_gguf_upstream
    from tests.merge import test_binding, test_merge, test_merge_families

    families = {name: kind for name, (kind, _) in test_gguf_families.FAMILIES.items()}
    others = {name: kind for name, (kind, _) in test_gguf_upstream.SHAPES.items()}
    own: dict[str, str] = {}  # a model_type itself
    sources = (
        ("merge", "✓", test_merge.test_equals_peft, "shape", own),
        ("merge", "✓", test_merge.test_moe_attention, "kind", own),
        ("merge", "✓", test_merge.test_experts, "kind", own),
        ("merge", "✓", test_binding.test_multimodal, "kind", own),
        ("merge", "✓", test_merge_families.test_equals_peft, "kind", own),
        ("quantized", "✓", test_compressed.test_experts, "kind", own),
        ("gguf", "✓", test_gguf_families.test_same_logits, "exported", families),
        ("gguf", "✓ c", test_gguf_upstream.test_same_logits_and_bytes, "name", others),
        ("gguf", "✓ p", test_gguf_upstream.test_multimodal, "kind", own),
        ("gguf-adapter", "✓ c", test_gguf_upstream.test_an_adapter_beside_its_base, "name", others),
    )
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for column, cell, test, name, types in sources:
        for value in cases(test, name):
            cells[types.get(value, value)].setdefault(column, cell)
    # what every export of the demo, and the schemes' own tests, have as their model
    cells["llama"] |= dict.fromkeys(COLUMNS, "✓")
    return cells


def lora_in_vllm(model_type: str) -> str:
    """Whether the pinned vLLM serves adapters of this architecture, by its own list."""
    from transformers.models.auto import modeling_auto as auto

    from lora2serve.adapters.vllm_support import lora_class

    names = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if model_type in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        names = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
    found = lora_class(names if isinstance(names, str) else names[0]) if names else None
    return "yes" if found and found.lora else "no"


def rows() -> list[str]:
    cells = tested()
    assert cells.keys() == LABELS.keys(), f"without a label, or without a test: {cells.keys() ^ LABELS.keys()}"
    return [
        f"| {label} | `{name}` | " + " | ".join([*(cells[name].get(c, "") for c in COLUMNS), lora_in_vllm(name)]) + " |"
        for name, label in LABELS.items()
    ]


def written() -> str:
    """The page as it must be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    head = (
        "| model | `model_type` | merged, 16 bits | `vllm --quant` | GGUF | `gguf-adapter` | LoRA in vLLM |\n"
        + "|---" * 7
        + "|\n"
    )
    return before + BEGIN + head + "".join(f"{row}\n" for row in rows()) + END + rest.partition(END)[2]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(written(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
