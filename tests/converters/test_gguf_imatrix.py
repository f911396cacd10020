"""Importance matrices and split files: beside llama.cpp's own quantizer, and beside sums made by hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.gguf import imatrix
from lora2serve.cli import run
from lora2serve.errors import CheckpointError, ExportError
from tests.converters.test_gguf_adapter import by_llama_cpp, nmse
from tests.converters.test_gguf_families import export, model_of, read
from tests.support.upstream import quantize

pytestmark = pytest.mark.engine

DATA = [{"text": f"The number {n} has the square {n * n}; its half is {n / 2}."} for n in range(40)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in DATA))
    return path


@pytest.fixture(scope="module", params=["llama", "qwen3-moe", pytest.param("gpt-oss", marks=pytest.mark.slow)])
def matrix(
    models: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, Path]:
    """A model and the matrix that an export left behind."""
    model, out = model_of(models, request.param), tmp_path_factory.mktemp("matrix")
    export(model, out, "-q", "Q4_K_M", "--calibrate", str(data))  # the same for every type, and quickest
    return model, out / "imatrix.gguf"


def inputs(model: Path, module: str) -> Any:
    """What a module of layer 1 is given on the first twenty rows, by transformers: (tokens, columns)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    seen: list[Any] = []
    loaded.get_submodule(module).register_forward_pre_hook(lambda _, values: seen.append(values[0].flatten(0, -2)))
    with torch.no_grad():
        for row in DATA:
            loaded(torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]]))
    return torch.cat(seen)


def test_means_of_activations(matrix: tuple[Path, Path]) -> None:
    """The input of layer 1's query, by hand; every expert that a token went to is counted."""
    model, path = matrix
    stored = imatrix.read(path)
    expected = inputs(model, "model.layers.1.self_attn.q_proj").double().square().mean(dim=0).numpy()
    np.testing.assert_allclose(stored.means["blk.1.attn_q.weight"][0], expected, rtol=1e-4)
    assert not np.allclose(stored.means["blk.0.attn_q.weight"][0], expected, rtol=1e-2), "layers differ"
    assert stored.datasets[0].endswith("data.jsonl")
    stacked = [values for name, values in stored.means.items() if "_exps" in name]
    assert all(len(values) == 4 for values in stacked)
    assert "output.weight" not in stored.means


@pytest.fixture(scope="module")
def unquantized(matrix: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(matrix[0], tmp_path_factory.mktemp("f16"), "-q", "F16", "--match-reference")


@pytest.mark.parametrize("kind", ["IQ3_XXS", "Q4_K_M", pytest.param("IQ2_XS", marks=pytest.mark.slow)])
def test_byte_identical_to_llama_quantize(
    matrix: tuple[Path, Path], unquantized: Path, tmp_path: Path, kind: str
) -> None:
    """The same types and bytes as llama.cpp's quantizer with the same matrix; without it they are others."""
    model, path = matrix
    keys, tensors = read(export(model, tmp_path / "ours", "-q", kind, "--match-reference", "--imatrix", str(path)))
    theirs = read(quantize(unquantized, tmp_path / "theirs.gguf", kind, imatrix.read(path).means))[1]
    assert {name: stored[0] for name, stored in tensors.items()} == {name: stored[0] for name, stored in theirs.items()}
    assert [name for name in tensors if tensors[name] != theirs[name]] == []
    assert keys["quantize.imatrix.entries_count"] == len(imatrix.read(path).means)
    if kind == "Q4_K_M":
        without = read(export(model, tmp_path / "without", "-q", kind, "--match-reference"))[1]
        assert [name for name in tensors if tensors[name] != without[name]]


def test_older_format(matrix: tuple[Path, Path], tmp_path: Path) -> None:
    _, path = matrix
    stored = imatrix.read(path)
    parts = [struct.pack("<i", len(stored.means))]
    for name, values in stored.means.items():
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", 7, values.size)]
        parts.append((values * 7).astype(np.float32).tobytes())
    old = tmp_path / "imatrix.dat"
    old.write_bytes(b"".join([*parts, struct.pack("<ii", 7, 5), b"stuff"]))
    again = imatrix.fit(imatrix.read(old), {name: (4, 2, values.shape[-1]) for name, values in stored.means.items()})
    assert (again.chunks, again.datasets) == (7, ("stuff",))
    for name, values in stored.means.items():
        np.testing.assert_allclose(again.means[name], values, rtol=1e-6)
    old.write_bytes(old.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match="are left"):
        imatrix.read(old)


def test_refused(models: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = model_of(models, "llama")
    words = ["export", str(model), "-t", "gguf", "-q", "IQ2_XS", "-o", str(tmp_path / "out")]
    assert run(words) == 1
    assert "IQ2_XS needs an importance matrix" in capfd.readouterr().err
    matrix = tmp_path / "imatrix.gguf"
    ones = {"blk.0.attn_q.weight": np.ones((1, 256), np.float32)}
    imatrix.write(matrix, ones, {name: np.ones(1, np.float32) for name in ones}, "x", 512)
    assert run([*words, "--imatrix", str(matrix)]) == 1
    assert "no importance matrix for blk." in capfd.readouterr().err
    with pytest.raises(ExportError, match=r"\[1, 256\], expected \[1, 128\]"):
        imatrix.read(matrix).of("blk.0.attn_q.weight", (256, 128))
    assert not (tmp_path / "out" / "gguf-IQ2_XS").exists()


def test_split(models: dict[str, Path], tmp_path: Path) -> None:
    """Several files of the size asked for, which llama.cpp loads as one model: the same bytes, the same answers."""
    model = model_of(models, "llama")
    whole = export(model, tmp_path / "whole", "-q", "Q8_0")
    first = export(model, tmp_path / "split", "-q", "Q8_0", "--split-size", "1MB")
    files = sorted(first.parent.glob("*.gguf"))
    assert [file.name for file in files] == [
        f"llama-Q8_0-{number:05}-of-{len(files):05}.gguf" for number in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    assert {name: stored for file in files for name, stored in read(file)[1].items()} == read(whole)[1]
    assert all(file.stat().st_size < 1_100_000 for file in files[1:])
    assert nmse(by_llama_cpp(files[0]), by_llama_cpp(whole)) == 0
