"""An engine is asked once for exports that hold equal files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lora2serve.parity_check.comparisons import Comparison
from lora2serve.parity_check.equal_files import opens_the_same

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


def test_a_modelfile_that_sets_something_is_another_file(tmp_path: Path) -> None:
    one, other = gguf(tmp_path / "gguf-Q8_0"), gguf(tmp_path / "ollama-Q8_0")
    modelfiles = [tmp_path / name / "Modelfile" for name in ("gguf-Q8_0", "ollama-Q8_0")]
    for path in modelfiles:
        path.write_text("FROM demo.gguf\nPARAMETER repeat_penalty 1.5\n")
    with_one, with_other = (
        replace(each, options={**each.options, "modelfile": str(path)})
        for each, path in zip((one, other), modelfiles, strict=True)
    )
    assert not opens_the_same(one, with_other) and not opens_the_same(with_one, other)
    assert opens_the_same(with_one, with_other), "the control"
    modelfiles[1].write_text("FROM demo.gguf\nPARAMETER repeat_penalty 1.1\n")
    assert not opens_the_same(with_one, with_other)


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
