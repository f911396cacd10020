"""llama.cpp's own source, fetched once into the user's cache: its converter, real vocabularies, real chat templates.

The one way for tests to get it. It is an oracle: nothing of it is copied into this repository.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from converters.gguf.quick_reader import open_gguf
from lora2serve.progress import Silent
from lora2serve.system.doctor import unpack_source_package


@cache
def llama_cpp_dir() -> Path:
    """The tree of the installed version: ``LLAMA_CPP_DIR``, or unpacked once into the user's cache."""
    return unpack_source_package(Silent())


@cache
def chat_templates() -> dict[str, str]:
    """The chat templates of about 70 published models, by their file's name without its suffix."""
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
