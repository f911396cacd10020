"""The report says where an engine computed in another type than the export is served in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora2serve.artifacts.manifest import FileEntry, Manifest
from lora2serve.parity_check.comparisons import Comparison, served_otherwise

FILES = {"config.json": FileEntry(sha256="0" * 64, size=2)}


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
