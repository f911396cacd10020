"""Settings that an engine had otherwise than ``serve`` starts the export with: a row's first table says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora2serve.artifacts.manifest import FileEntry, Manifest
from lora2serve.parity_check.comparisons import Comparison, served_otherwise

LONG = {"rope_type": "longrope", "original_max_position_embeddings": 4096}

FILES = {"config.json": FileEntry(sha256="0" * 64, size=2)}


@pytest.mark.parametrize(
    ("served", "rope", "engine", "computed", "expected"),
    [
        ("dtype: bfloat16\nmax-model-len: 512", {}, "vllm", "bfloat16", ""),
        ("max-model-len: 131072", LONG, "vllm", None, "LongRoPE's short factors; at max-model-len 131072 vLLM"),
        ("max-model-len: 131072", LONG, "transformers", None, ""),
        ("max-model-len: 4096", LONG, "vllm", None, ""),
        ("max-model-len: 131072", {"rope_type": "yarn"}, "vllm", None, ""),
        ("kv-cache-dtype: fp8", {}, "vllm", None, "without kv-cache-dtype of serve.yaml"),
        ("kv-cache-dtype: fp8", {}, "vllm-server", None, ""),  # which has it
        ("[", {}, "vllm", "float32", ""),  # the settings gate says so
    ],
)
def test_it_is_said(
    tmp_path: Path, served: str, rope: dict[str, Any], engine: str, computed: str | None, expected: str
) -> None:
    (tmp_path / "serve.yaml").write_text(served)
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": rope}))
    Manifest(target="vllm", files=FILES).write(tmp_path)
    comparison = Comparison("export", tmp_path, "vllm", "bfloat16", engine, {}, "original")
    found = served_otherwise(comparison, computed, tmp_path, 600)
    assert found.startswith(expected) and bool(found) == bool(expected)


def test_another_base_is_named(tmp_path: Path) -> None:
    for chosen, expected in (("org/other-base", "on base, served on org/other-base"), (None, "")):
        Manifest(target="adapter", files=FILES, options={"served_base": chosen} if chosen else {}).write(tmp_path)
        comparison = Comparison("export", tmp_path, "adapter", "lora", "vllm", {}, "original")
        (tmp_path / "serve.yaml").write_text("dtype: auto")
        assert served_otherwise(comparison, "float32", Path("models/base"), 600) == expected


@pytest.mark.parametrize(
    ("serve", "base", "computed", "words"),
    [
        ("dtype: bfloat16\n", "float16", "float32", "computed in float32, served in bfloat16"),
        ("dtype: float32\n", "float16", "float32", ""),
        ("dtype: auto\n", "bfloat16", "float32", ""),  # the engine decides
        (None, "bfloat16", "float32", "computed in float32, served in bfloat16"),  # an adapter: as its base
        (None, "bfloat16", "bfloat16", ""),
        (None, "float32", "float32", ""),
        ("dtype: bfloat16\n", "bfloat16", None, ""),  # as it serves
    ],
)
def test_another_type_is_named(tmp_path: Path, serve: str | None, base: str, computed: str | None, words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": base}))
    export = tmp_path / "adapter"
    export.mkdir()
    if serve:
        (export / "serve.yaml").write_text(serve)
    Manifest(target="vllm", files=FILES).write(export)
    comparison = Comparison("adapter", export, "adapter", "lora", "vllm", {}, "original")
    assert served_otherwise(comparison, computed, tmp_path, 600) == words
