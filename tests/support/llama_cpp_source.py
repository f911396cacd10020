"""llama.cpp's own source, fetched once into the user's cache: its converter, real vocabularies, real chat templates.

The one way for tests to get it. It is an oracle: nothing of it is copied into this repository.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from converters.gguf.quick_reader import open_gguf
from lora2serve.progress import Silent
from lora2serve.system.doctor import unpack_source_package

CACHE_VARIABLE = "XDG_CACHE_HOME"
CACHE = os.environ.get(CACHE_VARIABLE)  # the first test that asks may have another one for itself, which is empty
# Of each kind of chat template a few, which take a fifth of the time of all: they write in turn, rewrite history, think,
# call tools, refuse a system turn, want a variable of their own.
FEW = (
    "Bielik-11B-v3.0-Instruct", "CohereForAI-c4ai-command-r7b-12-2024-tool_use", "GLM-4.7-Flash",
    "HuggingFaceTB-SmolLM3-3B", "Kimi-K2-Instruct", "LFM2.5-Instruct", "MiniMax-M1", "NVIDIA-Nemotron-Nano-v2",
    "Qwen-QwQ-32B", "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "Spark2.5",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "deepseek-ai-DeepSeek-V3.1", "fireworks-ai-llama-3-firefunction-v2",
    "google-gemma-2-2b-it", "ibm-granite-granite-3.3-2B-Instruct", "llama-cpp-rwkv-world",
    "meetkai-functionary-medium-v3.1", "meta-llama-Llama-3.1-8B-Instruct", "microsoft-Phi-3.5-mini-instruct",
    "mistralai-Mistral-Nemo-Instruct-2407", "openai-gpt-oss-120b", "poolside-Laguna-S-2.1",
)  # fmt: skip
in_a_few_templates = pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)])


@cache
def llama_cpp_dir() -> Path:
    """The tree of the installed version: ``LLAMA_CPP_DIR``, or unpacked once into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        if CACHE is None:
            patch.delenv(CACHE_VARIABLE, raising=False)
        else:
            patch.setenv(CACHE_VARIABLE, CACHE)
        return unpack_source_package(Silent())


@cache
def chat_templates(few: bool = False) -> dict[str, str]:
    """The chat templates of about 70 published models, by their file's name without its suffix; or FEW of them."""
    if few:
        return {name: chat_templates()[name] for name in FEW}
    files = sorted((llama_cpp_dir() / "models" / "templates").glob("*.jinja"))
    return {path.stem: path.read_text(encoding="utf-8") for path in files}


def vocabulary(name: str) -> Path:
    """The vocabulary of a published model (``qwen2``, ``llama-spm``, ...) as a GGUF file without tensors."""
    return llama_cpp_dir() / "models" / f"ggml-vocab-{name}.gguf"


@cache
def sentencepiece_tokenizer(name: str) -> Any:
    """The tokenizer of a vocabulary of SentencePiece's BPE (``llama-spm``, ``phi-3``), as transformers would load it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    fields = open_gguf(vocabulary(name)).fields
    tokens, scores, kinds, end = (
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type", "eos_token_id")
    )
    ids = {token: number for number, token in enumerate(tokens)}
    merges = [
        (-scores[number], ids[token[:cut]], ids[token[cut:]], (token[:cut], token[cut:]))
        for number, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    pairs = [pair for _, _, _, pair in sorted(merges)]
    tokenizer = Tokenizer(models.BPE(ids, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=tokens[end], unk_token="<unk>"
    )
