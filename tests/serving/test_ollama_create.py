"""``export --create``: the demo's export becomes a model on a server, and answers there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from converters.ollama.conversations import conversations
from converters.ollama.create_request import request
from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.run import Run
from lora2serve.cli import run
from lora2serve.errors import EngineError, InputError
from lora2serve.progress import Silent
from lora2serve.serving import ollama
from lora2serve.system.small_files import digest
from tests.support.ollama_server import OllamaServer

NAME = "lora2serve-test"


@pytest.fixture
def export(demo_exports: Mapping[str, Path], tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(demo_exports["ollama-Q4_K_M"], tmp_path / "ollama-Q4_K_M"))


@pytest.fixture
def created(any_ollama: str, export: Path) -> Iterator[ollama.OllamaClient]:
    """The demo on a server."""
    client = ollama.OllamaClient(any_ollama)
    ollama.create(client, export, NAME, Silent())
    yield client
    with suppress(EngineError):
        client.delete(NAME)


def test_it_answers_as_trained(created: ollama.OllamaClient, demo_run: Run) -> None:
    """What the demo was trained to know; the base has never heard of it."""
    row = json.loads(demo_run.eval_data.read_text().splitlines()[0])["messages"]
    answer = created.chat(NAME, row[:-1], options={"temperature": 0, "num_predict": 64})
    assert answer["message"]["content"].strip() == row[-1]["content"].strip()
    assert ollama.ask(created, NAME)


def test_its_prompts_are_the_trained_ones(created: ollama.OllamaClient, demo_run: Run) -> None:
    """Byte for byte, as the server renders them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_run.adapter)
    for messages in list(conversations(True))[::7]:
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert created.render(NAME, messages) == expected


def test_the_request(export: Path) -> None:
    """As ``ollama create`` makes it of the Modelfile."""
    body, files = request(export)
    (name,) = body["files"].values()
    assert files == {name: export / "demo-Q4_K_M.gguf"}
    assert name == f"sha256:{digest(export / 'demo-Q4_K_M.gguf')['sha256']}"
    assert body["template"] == (export / "template").read_text()
    assert body["parameters"] == json.loads((export / "params").read_text())
    text = (export / "Modelfile").read_text()
    more = 'PARAMETER top_k 3\nPARAMETER use_mmap true\nPARAMETER stop "a"\nMESSAGE user Hi: you\nLICENSE one\nLICENSE two\n'
    (export / "Modelfile").write_text(text + more + "PARAMETER mirostat 1\n")
    body, _ = request(export)
    assert body["parameters"]["top_k"] == 3
    assert body["parameters"]["use_mmap"] is True
    assert body["parameters"]["stop"][-1] == "a"
    assert body["messages"] == [{"role": "user", "content": "Hi: you"}]
    assert body["license"] == ["one", "two"]
    assert "mirostat" not in str(body)


def export_demo(run_dir: Path, out: Path, *more: str) -> int:
    return run(["export", str(run_dir), "-t", "ollama", "-q", "F16", "-o", str(out), *more])


def test_from_the_command_line(ollama: OllamaServer, demo_run: Run, tmp_path: Path, capfd: Any) -> None:
    """Blob, model, question and answer; the second time the blob is there already."""
    assert export_demo(demo_run.path, tmp_path, "--create", "me/demo:v1") == 0
    out, err = capfd.readouterr()
    assert out.split() == [str(tmp_path / "ollama-F16")]
    assert f"created me/demo:v1 at {ollama.url}" in err
    assert "Hello! Who are you?" in err
    assert "ollama run me/demo:v1" in err
    stored = ollama.models["me/demo:v1"]
    assert stored.model.read_bytes() == (tmp_path / "ollama-F16" / "demo-F16.gguf").read_bytes()
    assert stored.template == (tmp_path / "ollama-F16" / "template").read_text()
    assert export_demo(demo_run.path, tmp_path, "--create", "again", "--overwrite") == 0
    assert "is already uploaded" in capfd.readouterr().err
    assert ollama.count("POST", "blob") == 1


def test_without_a_server(demo_run: Run, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export is kept and the command is printed."""
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    assert export_demo(demo_run.path, tmp_path, "--create", "demo") == 0
    err = capfd.readouterr().err
    assert "no Ollama answers at http://127.0.0.1:9" in err
    assert f"ollama create demo -f {tmp_path}/ollama-F16/Modelfile" in err
    assert not Export.open(tmp_path / "ollama-F16").verify()


@pytest.mark.parametrize(
    ("endpoint", "kind", "message"),
    [
        ("create", "stream", "api/create: out of disk"),
        ("create", "short", "ended without success"),
        ("create", "status", "api/create answers 500: out of disk"),
        ("blob", "corrupt", "digest mismatch"),
        ("chat", "undone", "not complete (done is False)"),
    ],
)
def test_a_failure_names_what_ollama_said(
    ollama: OllamaServer, demo_run: Run, tmp_path: Path, capfd: Any, endpoint: str, kind: str, message: str
) -> None:
    """Exit code 1, and the export is kept."""
    ollama.fail(endpoint, kind, message="out of disk")
    assert export_demo(demo_run.path, tmp_path, "--create", "demo") == 1
    assert message in capfd.readouterr().err
    assert not Export.open(tmp_path / "ollama-F16").verify()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-t", "gguf", "--create", "demo"), "--create: only for --target ollama"),
        (("-t", "ollama", "--create", "my demo"), "invalid model name"),
        (("-t", "ollama", "-q", "F16", "-q", "Q8_0", "--create", "demo:v1"), "expected a name without a tag"),
        (("-t", "gguf", "--as", "adapter"), "--as adapter: only for --target ollama"),
        (("-t", "ollama", "--from", "llama3"), "--from: only for --target ollama --as adapter"),
        (("-t", "gguf", "--install"), "--install: not an option of --target gguf"),
    ],
)
def test_refused_before_the_work(
    demo_run: Run, tmp_path: Path, capfd: Any, words: tuple[str, ...], message: str
) -> None:
    assert run(["export", str(demo_run.path), "-o", str(tmp_path), *words]) == 2
    assert message in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_several_types_get_tags(ollama: OllamaServer, demo_run: Run, tmp_path: Path) -> None:
    assert export_demo(demo_run.path, tmp_path, "-q", "Q8_0", "--create", "demo") == 0
    assert list(ollama.models) == ["demo:F16", "demo:Q8_0"]


def test_a_server_that_is_too_old(ollama: OllamaServer, export: Path) -> None:
    """Said before anything is sent; a build of a developer without a number passes."""
    from lora2serve.serving import ollama as api

    modelfile = export / "Modelfile"
    modelfile.write_text(modelfile.read_text() + "REQUIRES 0.30.0\n")
    ollama.version = "0.29.9"
    with pytest.raises(EngineError, match=r"Ollama 0\.29\.9 .* needs 0\.30\.0 or newer"):
        api.create(api.OllamaClient(), export, NAME, Silent())
    assert ollama.count("POST", "blob") == 0
    for version in ("0.30.0-rc1", "1.0.0", "0.0.0"):
        ollama.version = version
        api.create(api.OllamaClient(), export, NAME, Silent())


def test_a_file_that_changed_since(ollama: OllamaServer, export: Path) -> None:
    from lora2serve.serving import ollama as api

    gguf = export / "demo-Q4_K_M.gguf"
    raw = gguf.read_bytes()
    gguf.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(EngineError, match="digest mismatch"):
        api.create(api.OllamaClient(), export, NAME, Silent())
    assert not ollama.models


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FORM ./x.gguf\n", "command must be one of"),
        ("FROM ./demo-Q4_K_M.gguf\nADAPTER ./gone.gguf\n", "but missing"),
    ],
)
def test_a_broken_modelfile(export: Path, text: str, message: str) -> None:
    (export / "Modelfile").write_text(text)
    with pytest.raises(InputError, match=message):
        request(export)
    (export / "Modelfile").unlink()
    with pytest.raises(InputError, match="no Modelfile"):
        request(export)
