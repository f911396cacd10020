"""Real vocabularies, rebuilt from llama.cpp's own vocab-only files: named by their rules, proven by llama.cpp."""

from __future__ import annotations

import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from converters.gguf import header
from converters.gguf.native import pretokenizer, vocab
from converters.gguf.quick_reader import open_gguf
from lora2serve.cli import run
from tests.support.llama_cpp_source import vocabulary

pytestmark = pytest.mark.engine

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
RULES = {name: steps for steps, name in pretokenizer.PRE_TOKENIZERS.items()}
# file -> our name for its rules, where llama.cpp gives several names to the same ones
BYTE_LEVEL = {
    "llama-bpe": "llama-bpe",
    "qwen2": "qwen2",
    "qwen35": "qwen35",
    "gpt-2": "gpt-2",
    "mpt": "gpt-2",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "falcon": "falcon",
    "deepseek-coder": "deepseek-coder",
    "deepseek-llm": "deepseek-llm",
}
NORMALIZERS = {"command-r": "NFC", "qwen2": "NFC", "mpt": "NFC"}


@cache
def read(name: str) -> tuple[dict[str, Any], list[str], list[list[int]]]:
    """The vocabulary's metadata, upstream's test texts, and the ids it expects."""
    path = vocabulary(name)
    keys = {key: field.contents() for key, field in open_gguf(path).fields.items() if key.startswith("tokenizer")}
    texts = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    ids = [[int(word) for word in line.split()] for line in Path(f"{path}.out").read_text().splitlines()]
    return keys, texts[: len(ids)], ids


def steps(rules: tuple[str, ...]) -> list[dict[str, Any]]:
    """The steps of a tokenizer.json: the inverse of ``pretokenizer._steps``."""
    parts: list[dict[str, Any]] = []
    for rule in rules:
        if rule.startswith("digits"):
            parts.append({"type": "Digits", "individual_digits": rule == "digits:single"})
        elif rule == "punctuation":
            parts.append({"type": "Punctuation", "behavior": "Contiguous"})
        elif rule.startswith("bytelevel"):
            regex = rule == "bytelevel:regex"
            parts.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex})
        else:
            parts.append({"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False})
    return parts


def rebuild(name: str, path: Path) -> int:
    """A tokenizer.json from a byte-level vocabulary; how many tokens it has."""
    keys, _, _ = read(name)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    added = [
        {"id": number, "content": token, "special": kind == CONTROL, "normalized": kind != CONTROL}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    model = {
        "type": "BPE", "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": keys["tokenizer.ggml.merges"], "ignore_merges": name == "llama-bpe",
    }  # fmt: skip
    pre = {"type": "Sequence", "pretokenizers": steps(RULES[BYTE_LEVEL[name]])}
    content = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": pre, "model": model}
    if name in NORMALIZERS:
        content["normalizer"] = {"type": NORMALIZERS[name]}
    content["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (path / "tokenizer.json").write_text(json.dumps(content))
    return len(tokens)


def model_around(path: Path, rows: int) -> None:
    """The smallest Llama with that vocabulary; its weights are never read."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": rows, "hidden_size": 32,
        "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "dtype": "float16",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0."
    square = [f"{layer}self_attn.{part}_proj.weight" for part in "qkvo"]
    square += [f"{layer}mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    shapes: dict[str, list[int]] = {key: [32, 32] for key in square}
    shapes |= {f"{layer}{part}_layernorm.weight": [32] for part in ("input", "post_attention")}
    shapes |= {"model.norm.weight": [32], "model.embed_tokens.weight": [rows, 32]}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name], end = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}, end + size
    raw = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)


@pytest.mark.parametrize(
    "name", ["gpt-2", *(pytest.param(n, marks=pytest.mark.slow) for n in BYTE_LEVEL if n != "gpt-2")]
)
def test_byte_level(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The rebuilt tokenizer gives upstream's ids, is named by its rules, and llama.cpp splits our text the same way."""
    from tokenizers import Tokenizer

    rows = rebuild(name, tmp_path)
    model_around(tmp_path, rows + 64)  # a padded embedding
    _, texts, ids = read(name)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [tokenizer.encode(text, add_special_tokens=False).ids for text in texts] == ids
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert pretokenizer.pre_tokenizer(tmp_path / "tokenizer.json", content) == BYTE_LEVEL[name]
    words = ["export", str(tmp_path), "-t", "gguf", "-q", "F16", "--plan", "-o", str(tmp_path / "out")]
    assert run(words) == 0, capfd.readouterr().err
    other = "gpt-2" if name in ("qwen2", "deepseek-coder", "deepseek-llm") else "qwen2"
    assert run([*words, "--pre", other]) == 1, "the control: another split is found out"
    assert "llama.cpp splits" in capfd.readouterr().err


def test_two_tokens_of_one_text(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp would end its process: an added token that is no text of its own reads as another one does.

    What we do not know of ends llama.cpp's process too, and is an error of ours all the same.
    """
    rows = rebuild("gpt-2", tmp_path)
    model_around(tmp_path, rows + 64)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    plain = {"special": False, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"] += [{"id": rows + n, "content": token, **plain} for n, token in enumerate(("öö", "õõ"))]
    path.write_text(json.dumps(content))
    words = ["export", str(tmp_path), "-t", "gguf", "-q", "F16", "--plan", "-o", str(tmp_path / "out")]
    assert run(words) == 1
    assert f"tokens {rows} and {rows + 1} are both '\ufffd\ufffd'" in capfd.readouterr().err
    monkeypatch.setattr(header, "_refuse_twins", lambda keys: None)
    assert run(words) == 1
    error = capfd.readouterr().err
    assert "llama.cpp died (signal SIGABRT)" in error and "GGML_ASSERT" in error


@pytest.mark.parametrize("name", ["gpt-2", pytest.param("llama-bpe", marks=pytest.mark.slow)])
def test_the_hash_is_the_second_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Where the rules are unknown to us, upstream's table of hashes knows a real vocabulary, and no other."""
    rebuild(name, tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    bos = None if name == "gpt-2" else {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {"<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [128000], "tokens": ["<|begin_of_text|>"]}}}  # fmt: skip
    path.write_text(json.dumps({**content, "post_processor": bos}))
    monkeypatch.setattr(pretokenizer, "PRE_TOKENIZERS", {})
    assert pretokenizer.pre_tokenizer(path, content) == name
    from lora2serve.errors import ExportError

    fewer = {**content["model"], "merges": content["model"]["merges"][:1000]}
    path.write_text(json.dumps({**content, "model": fewer, "post_processor": bos}))
    with pytest.raises(ExportError, match=r"no llama\.cpp name"):
        pretokenizer.pre_tokenizer(path, content)


def rebuild_sentencepiece(path: Path) -> int:
    """Llama 2's tokenizer.json: its merges follow from pieces and scores; how many tokens it has."""
    keys, _, _ = read("llama-spm")
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    ids = {token: number for number, token in enumerate(tokens)}
    merges = [
        (-keys["tokenizer.ggml.scores"][number], ids[token[:cut]], ids[token[cut:]])
        for token, number in ids.items()
        if kinds[number] == NORMAL
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    added = [
        {"id": number, "content": token, "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for number, token in enumerate(tokens[:3])
    ]
    model = {
        "type": "BPE", "vocab": ids, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
        "merges": [[tokens[left], tokens[right]] for _, left, right in sorted(merges)],
    }  # fmt: skip
    spaces = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    content = {"version": "1.0", "added_tokens": added, "pre_tokenizer": None, "model": model}
    content["normalizer"] = {"type": "Sequence", "normalizers": spaces}
    (path / "tokenizer.json").write_text(json.dumps(content))
    return len(tokens)


def test_sentencepiece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Llama 2's, without its tokenizer.model: the scores come from the merges, and llama.cpp splits as before."""
    from tokenizers import Tokenizer

    model_around(tmp_path, rebuild_sentencepiece(tmp_path))
    _, texts, ids = read("llama-spm")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [tokenizer.encode(text, add_special_tokens=False).ids for text in texts] == ids
    words = ["export", str(tmp_path), "-t", "gguf", "-q", "F16", "--plan", "-o", str(tmp_path / "out")]
    assert run(words) == 0, capfd.readouterr().err
    monkeypatch.setattr(vocab, "_merge_ranks", lambda merges: {})
    assert run(words) == 1, "the control: pieces without scores"
    assert "llama.cpp splits" in capfd.readouterr().err


def test_spaces_before_a_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Mistral 0.3 puts a space only where nothing precedes: right in llama.cpp after any special token, so in prompts."""
    model_around(tmp_path, rebuild_sentencepiece(tmp_path))
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    for scheme in ("first", "never", "always"):
        step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        path.write_text(json.dumps({**content, "normalizer": None, "pre_tokenizer": step}))
        code = run(["export", str(tmp_path), "-t", "gguf", "-q", "F16", "-o", str(tmp_path / "out"), "--plan"])
        error = capfd.readouterr().err
        assert code == (scheme == "always"), error
    assert "llama.cpp splits" in error, "the control: a space unless there is one is nothing that llama.cpp can do"
