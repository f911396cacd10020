"""Names of models, adapters and runs: one check, whichever command they come to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lora2serve.api.export_request import ExportRequest
from lora2serve.api.train_run import train
from lora2serve.artifacts import run as runs
from lora2serve.cli import run
from lora2serve.config import recipe as recipes
from lora2serve.config.model_name import ollama_name, refuse_name, refuse_run_name
from lora2serve.errors import RecipeError, UsageError
from lora2serve.serving import ollama, runtime_lora

BAD = [
    "../../../x", "/tmp/x", "a/b", "a\\b", "..", ".", ".hidden", "-o", "", " ", " a", "a ", "a\nb", "a\x00b", "a\x1b[31m",
    "a\u202eb", "a\u2028b", "x" * 201, "é" * 101, "latest", "NUL", "com1.gguf", "a\ud800",
]  # fmt: skip
PLAIN = ["demo", "Llama-3.2-1B", "a", "x" * 200, "v2_final", "latest-2", "console"]
FREE = ["My model (2)", "größe", "模型", "it's"]  # a directory may be called so: no run of ours is


def recipe_of(name: str, folder: Path) -> None:
    path = folder / "recipe.yaml"
    path.write_text("model: {path: x}\ndata: {train: y}\n")
    recipes.load(path, [f"name={name!r}"])


WAYS: dict[str, Callable[[str, Path], object]] = {
    "export --name": lambda name, folder: ExportRequest((folder,), ("vllm",), name=name),
    "train --name": lambda name, folder: train(folder / "none.yaml", name=name),
    "a run": runs.create,
    "adapters add": lambda name, folder: runtime_lora.add("http://localhost:1", name, folder),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BAD)
def test_refused_everywhere(tmp_path: Path, way: str, name: str) -> None:
    """One line that shows it, nothing of it raw, before anything is opened or made."""
    with pytest.raises(UsageError) as caught:
        WAYS[way](name, tmp_path)
    assert "expected" in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 200
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../../x", "latest", "x y"])
def test_of_a_recipe(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="name: "):
        recipe_of(name, tmp_path)
    recipe_of("fine", tmp_path)


def test_taken(tmp_path: Path) -> None:
    """The control."""
    for name in PLAIN:
        refuse_run_name(name, "--name")
        assert runs.create(name, tmp_path).name == name
    for name in [*PLAIN, *FREE]:
        refuse_name(name, "--name")
    refuse_name("latest", "a directory's", chosen=False)
    for name in FREE:
        with pytest.raises(UsageError):
            refuse_run_name(name, "--name")


def test_nothing_is_written_beside(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By the command line: refused before the model is looked for."""
    assert run(["export", "nothing", "-t", "gguf", "--name", "../../../x", "-o", str(tmp_path / "out")]) == 2
    assert "--name: '../../../x', expected a plain name" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*PLAIN, *FREE, "Llama-3.2 1B+x"])
def test_in_ollama(name: str) -> None:
    """Ollama's own rule takes it, and the adapter of a run has another name than its merged model."""
    names = [ollama_name(name, target) for target in ("ollama", "ollama-adapter")]
    assert len(set(names)) == 2
    for called in names:
        ollama.refuse_name(called)
    assert ollama_name("Llama-3.2 1B+x", "ollama") == "llama-3.2-1b-x"
