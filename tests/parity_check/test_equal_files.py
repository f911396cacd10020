"""An engine is asked once for exports that hold equal files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora2serve.parity_check.comparisons import Comparison
from lora2serve.parity_check.equal_files import answers_the_same, opens_the_same

CONTENT = bytes(range(256)) * 500


def gguf(folder: Path, content: bytes = CONTENT, name: str = "demo.gguf") -> Comparison:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    (folder / "lora2serve.json").write_text(folder.name)
    options = {"model": str(folder / name), "window": 512}
    return Comparison(folder.name, folder, "gguf", "Q8_0", "llama.cpp", options, "trained")


def test_equal_ggufs_of_two_targets(tmp_path: Path) -> None:
    """Whatever the file is called, and whatever lies beside it: llama.cpp opens the file alone."""
    one, other = gguf(tmp_path / "gguf-Q8_0"), replace(gguf(tmp_path / "ollama-Q8_0", name="x.gguf"), target="ollama")
    (tmp_path / "ollama-Q8_0" / "Modelfile").write_text("FROM x.gguf\n")
    assert opens_the_same(one, other)
    same_file = gguf(tmp_path / "linked")
    (tmp_path / "linked" / "demo.gguf").unlink()
    (tmp_path / "linked" / "demo.gguf").hardlink_to(tmp_path / "gguf-Q8_0" / "demo.gguf")
    assert opens_the_same(one, same_file)


@pytest.mark.parametrize("change", ["byte", "length", "engine", "kind", "reference", "options", "part", "deployment"])
def test_what_differs_is_asked_again(tmp_path: Path, change: str) -> None:
    one, other = gguf(tmp_path / "a"), gguf(tmp_path / "b")
    assert opens_the_same(one, other), "the control"
    path = tmp_path / "b" / "demo.gguf"
    if change == "byte":
        path.write_bytes(CONTENT[:-1] + b"\0")
    elif change == "length":
        path.write_bytes(CONTENT + b"\0")
    elif change == "part":
        (tmp_path / "b" / "demo2.gguf").write_bytes(b"")
    else:
        changes: dict[str, dict[str, object]] = {
            "engine": {"engine": "ollama"},
            "kind": {"kind": "Q6_K"},
            "reference": {"reference": "original"},
            "options": {"options": {**other.options, "window": 64}},
            "deployment": {"path": None},
        }
        other = replace(other, **changes[change])  # type: ignore[arg-type]
    assert not opens_the_same(one, other)


@pytest.mark.parametrize(
    ("parameters", "answer", "same"),
    [
        ('PARAMETER stop "<|im_end|>"', "Leon Lake.", True),
        ('PARAMETER stop "Lake"', "Leon Lake.", False),
        ("PARAMETER repeat_penalty 1.5", "Leon Lake.", False),
        ("PARAMETER num_predict 3", "Leon Lake.", False),
        ("PARAMETER temperature 0.7", "Leon Lake.", True),
        ("NONSENSE", "Leon Lake.", False),
    ],
)
def test_a_modelfile_that_changes_an_answer(tmp_path: Path, parameters: str, answer: str, same: bool) -> None:
    """Chance is not compared, so a temperature changes nothing; the order in which the two are asked may."""
    content = tiny_gguf(tmp_path / "tiny.gguf")
    one, other = gguf(tmp_path / "gguf-Q8_0", content), gguf(tmp_path / "ollama-Q8_0", content)
    (tmp_path / "ollama-Q8_0" / "Modelfile").write_text(f"FROM demo.gguf\n{parameters}\n")
    other = replace(other, options={**other.options, "modelfile": str(tmp_path / "ollama-Q8_0" / "Modelfile")})
    assert opens_the_same(one, other)
    assert answers_the_same(one, [answer], other) == same
    assert answers_the_same(other, [answer], one) == (same and "stop" not in parameters)
    assert answers_the_same(one, [answer], gguf(tmp_path / "second", content)), "the control"


def tiny_gguf(path: Path) -> bytes:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_tensor("w", np.zeros((32, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_of_a_directory_every_file_counts(tmp_path: Path) -> None:
    """But for the manifest, which says what parity found."""

    def merged(name: str) -> Comparison:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(CONTENT)
        (folder / "generation_config.json").write_text("{}")
        (folder / "lora2serve.json").write_text(name)
        return Comparison(name, folder, "vllm", "bfloat16", "vllm", {"model": str(folder), "window": 9}, "trained")

    one, other = merged("a"), merged("b")
    assert opens_the_same(one, other)
    (tmp_path / "b" / "generation_config.json").write_text('{"temperature": 1}')
    assert not opens_the_same(one, other)
