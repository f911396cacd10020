"""What the tests on a GPU share: the reason to skip, and a model large enough to measure."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.support.runs import DEMO, rows, write_jsonl


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs CUDA."""
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is False")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(skip)


@pytest.fixture(scope="session")
def billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 1.1 billion parameters (the shape of TinyLlama), bfloat16, with the demo's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("billion") / "base"
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).bfloat16()
    assert 1.0e9 < sum(parameter.numel() for parameter in model.parameters()) < 1.2e9
    model.save_pretrained(path)
    del model
    torch.cuda.empty_cache()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / "base" / name, path / name)
    return path


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """``data`` of a recipe: rows long enough to fill 512 tokens once packed."""
    root = tmp_path_factory.mktemp("prose")
    text = [row["text"] for row in rows("general.jsonl", 1000)]
    joined = [{"text": "\n".join(text[start : start + 16])} for start in range(0, len(text), 2)]
    return {
        "train": str(write_jsonl(root / "train.jsonl", joined[8:] * 4)),
        "eval": str(write_jsonl(root / "eval.jsonl", joined[:8])),
    }
