"""``--target ollama --as adapter``: the adapter on a base that Ollama has, in real llama.cpp behind our server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from converters.ollama.modelfile_parser import parse
from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.run import Run
from lora2serve.cli import run
from lora2serve.progress import Silent
from lora2serve.serving import ollama
from tests.conftest import lora2serve
from tests.support.ollama_server import OllamaServer

UNPROVEN = "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def base(demo_run: Run) -> Path:
    return Path(demo_run.record.base.path)


@pytest.fixture(scope="module")
def base_export(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base-ollama")
    (directory,) = lora2serve("export", base, "-t", "ollama", "-q", "F32", "-o", out, cwd=out).split()
    return Path(directory)


def as_adapter(subject: Path, out: Path, *more: str) -> int:
    return run(["export", str(subject), "-t", "ollama", "--as", "adapter", "-o", str(out), *more])


def test_it_answers_as_trained(any_ollama: str, demo_run: Run, base_export: Path, tmp_path: Path) -> None:
    """On a base by its name; the control, that base without the adapter, has never heard of it."""
    client = ollama.OllamaClient(any_ollama)
    ollama.create(client, base_export, "lora2serve-base", Silent())
    try:
        assert as_adapter(demo_run.path, tmp_path, "--from", "lora2serve-base", "--create", "lora2serve-tuned") == 0
        row = json.loads(demo_run.eval_data.read_text().splitlines()[0])["messages"]
        how = {"options": {"temperature": 0, "num_predict": 64}}
        tuned, plain = (client.chat(f"lora2serve-{name}", row[:-1], **how) for name in ("tuned", "base"))
        assert tuned["message"]["content"].strip() == row[-1]["content"].strip()
        assert plain["message"]["content"].strip() != row[-1]["content"].strip()
    finally:
        for name in ("tuned", "base"):
            client.delete(f"lora2serve-{name}")


def test_what_is_written(ollama: OllamaServer, demo_run: Run, base_export: Path, tmp_path: Path, capfd: Any) -> None:
    """FROM a file by its absolute path, ADAPTER beside the Modelfile, the proven template, and stops."""
    gguf = next(base_export.glob("*.gguf"))
    assert as_adapter(demo_run.path, tmp_path, "--from", str(gguf), "--create", "tuned") == 0
    directory = tmp_path / "ollama-adapter"
    merged = Export.open(base_export).manifest
    names = [str(export.use).split()[2] for export in (Export.open(directory).manifest, merged)]
    assert names == ["demo-adapter", merged.name], "the merged model of the run keeps the name itself"
    assert capfd.readouterr().out.split() == [str(directory)]
    commands = dict(parse((directory / "Modelfile").read_text()))
    assert commands["from"] == str(gguf)
    assert commands["adapter"] == "./demo-lora.gguf"
    assert commands["template"] == (directory / "template").read_text()
    assert json.loads((directory / "params").read_text())["stop"]
    assert not Export.open(directory).verify()
    facts = Export.open(directory).manifest.to_json()
    assert (facts["target"], facts["from"], facts["template"]["kind"]) == ("ollama-adapter", str(gguf), "go")
    stored = ollama.models["tuned:latest"]
    assert stored.adapter is not None
    assert stored.adapter.read_bytes() == (directory / "demo-lora.gguf").read_bytes()
    assert stored.model.read_bytes() == gguf.read_bytes()


def test_a_base_that_the_server_has_not(ollama: OllamaServer, demo_run: Run, tmp_path: Path, capfd: Any) -> None:
    assert as_adapter(demo_run.path, tmp_path, "--from", "nobody:1b", "--create", "tuned") == 1
    assert "file does not exist" in capfd.readouterr().err
    assert not Export.open(tmp_path / "ollama-adapter").verify()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected --from BASE"),
        (("--from", "./llama.gguf"), "--from ./llama.gguf: no such GGUF file"),
        (("--from", "models/llama.gguf"), "no such GGUF file"),
        (("--from", "llama3", "-q", "Q8_0"), "--quant Q8_0: unknown"),
    ],
)
def test_refused(demo_run: Run, tmp_path: Path, capfd: Any, words: tuple[str, ...], message: str) -> None:
    assert as_adapter(demo_run.path, tmp_path, *words) in (1, 2)
    assert message in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("trained", "before", "message"),
    [
        (UNPROVEN, None, "no proven template (turns look different"),
        (None, "{% if tools %}{{ tools }}{% endif %}" + UNPROVEN, "which Ollama would prefer"),
    ],
)
def test_no_prompt_but_the_trained_one(
    demo_run: Run, base: Path, tmp_path: Path, capfd: Any, trained: str | None, before: str | None, message: str
) -> None:
    """Without a proven template, or with one that a newer Ollama would pass over for the base's own."""
    adapter, other = (
        Path(shutil.copytree(path, tmp_path / name)) for path, name in ((demo_run.adapter, "adapter"), (base, "base"))
    )
    if trained:
        (adapter / "chat_template.jinja").write_text(trained)
    if before:
        (other / "chat_template.jinja").write_text(before)
    assert as_adapter(adapter, tmp_path / "out", "--base", str(other), "--from", "llama3") == 1
    assert message in " ".join(capfd.readouterr().err.split())
