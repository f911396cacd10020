"""``--target ollama`` on models whose template or generation config is not the usual."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from converters.gguf.gguf_scan import scan
from converters.ollama.conversations import turns
from converters.ollama.create_request import request
from converters.ollama.modelfile_parser import parse
from converters.ollama.ollama_sink import LOOKALIKE_GUARD
from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.run import Run
from lora2serve.cli import run
from lora2serve.progress import Silent
from lora2serve.serving.ollama import OllamaClient, create
from lora2serve.system.small_files import digest
from tests.converters.test_gguf_adapter import by_llama_cpp
from tests.support.ollama_engine import render_jinja
from tests.support.ollama_server import OllamaServer

NUMBERED = (
    "{% for m in messages %}<|im_start|>{{ loop.index }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>\n{% endif %}"
)
DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %B %Y') }}.<|im_end|>\n"


@pytest.fixture
def base(demo_run: Run, tmp_path: Path) -> Path:
    """The demo's base, to be changed."""
    return Path(shutil.copytree(demo_run.record.base.path, tmp_path / "base"))


def exported(base: Path, out: Path) -> Path:
    assert run(["export", str(base), "-t", "ollama", "-q", "F16", "-o", str(out)]) == 0
    return out / "ollama-F16"


def rendered(server: OllamaServer, export: Path) -> str:
    create(OllamaClient(), export, "demo", Silent())
    return OllamaClient().render("demo", turns(2, "Be brief."))


def trained(base: Path) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    return str(tokenizer.apply_chat_template(turns(2, "Be brief."), tokenize=False, add_generation_prompt=True))


def test_an_unproven_template(ollama: OllamaServer, base: Path, tmp_path: Path) -> None:
    """No TEMPLATE and no guess: the GGUF's own Jinja, kept apart from those that look like it, and REQUIRES."""
    (base / "chat_template.jinja").write_text(NUMBERED)
    directory = exported(base, tmp_path)
    commands = dict(parse((directory / "Modelfile").read_text()))
    assert "template" not in commands
    assert commands["requires"] == "0.30.0"
    assert not (directory / "template").exists()
    template = Export.open(directory).manifest.to_json()["template"]
    assert (template["kind"], template["requires"]) == ("jinja", "0.30.0")
    assert "turns look different" in template["why"]
    scan(next(directory.glob("*.gguf")))
    assert rendered(ollama, directory) == trained(base)
    assert ollama.load("demo:latest").jinja == LOOKALIKE_GUARD + NUMBERED


def test_a_template_that_knows_thinking(ollama: OllamaServer, base: Path, tmp_path: Path) -> None:
    """The server renders the GGUF's Jinja and turns thinking on; training had not. The control is the Jinja itself."""
    path = base / "chat_template.jinja"
    path.write_text(path.read_text() + "{% if enable_thinking %}<think>\n{% endif %}")
    directory = exported(base, tmp_path)
    assert rendered(ollama, directory) == trained(base)
    assert render_jinja(path.read_text(), turns(2, "Be brief.")) != trained(base)


def test_a_dated_template(ollama: OllamaServer, base: Path, tmp_path: Path) -> None:
    path = base / "chat_template.jinja"
    path.write_text(DATED + path.read_text())
    directory = exported(base, tmp_path)
    assert dict(parse((directory / "Modelfile").read_text()))["requires"] == "0.14.0"
    assert Export.open(directory).manifest.to_json()["template"]["dated"] is True
    assert "currentDate" in (directory / "template").read_text()
    assert rendered(ollama, directory) == trained(base)


def test_a_default_system_message(ollama: OllamaServer, base: Path, tmp_path: Path) -> None:
    """All three side files, and the same prompt with it and without."""
    path = base / "chat_template.jinja"
    default = "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nBe kind.<|im_end|>\n' }}{%- endif %}"
    path.write_text(default + path.read_text())
    directory = exported(base, tmp_path)
    assert (directory / "system").read_text() == "Be kind."
    assert {"Modelfile", "template", "system", "params"} <= set(Export.open(directory).manifest.files)
    create(OllamaClient(), directory, "demo", Silent())
    assert ollama.models["demo:latest"].system == "Be kind."
    plain = OllamaClient().render("demo", turns(1))
    assert plain.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")
    assert plain.count("Be kind.") == 1


def test_sampling_defaults_and_stops(base: Path, tmp_path: Path) -> None:
    """Numbers in Ollama's types; every end token of the generation config as text."""
    path = base / "generation_config.json"
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 1, "repetition_penalty": 1.05}
    path.write_text(json.dumps({**json.loads(path.read_text()), **sampling, "eos_token_id": [0, 1, 88, 10**6]}))
    directory = exported(base, tmp_path)
    params = json.loads((directory / "params").read_text())
    stop = params.pop("stop")
    context = json.loads((base / "config.json").read_text())["max_position_embeddings"]
    penalty = {"repeat_penalty": 1.05, "repeat_last_n": context}
    assert params == {"temperature": 0.7, "top_p": 1.0, "top_k": 20, **penalty}
    assert {"<|im_end|>", "<|endoftext|>"} <= set(stop)
    assert not [word for word in stop if "Ġ" in word or not word]


@pytest.mark.parametrize(("key", "value"), [("top_k", 0.5), ("temperature", "hot"), ("top_p", True)])
def test_a_sampling_default_that_is_none(base: Path, tmp_path: Path, capfd: Any, key: str, value: Any) -> None:
    path = base / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": True, key: value}))
    assert run(["export", str(base), "-t", "ollama", "-q", "F16", "-o", str(tmp_path / "out")]) == 1
    assert f"generation_config.json: {key} is {value!r}" in capfd.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


def test_a_split_file(base: Path, tmp_path: Path) -> None:
    """Its parts lie alone in a folder, which is what Ollama takes for one model; llama.cpp reads them as the whole."""
    whole = exported(base, tmp_path / "whole")
    words = ["export", str(base), "-t", "ollama", "-q", "F16", "--split-size", "1MB", "-o", str(tmp_path / "split")]
    assert run(words) == 0
    folder = tmp_path / "split" / "ollama-F16"
    parts = sorted((folder / "gguf").iterdir())
    assert len(parts) > 1
    assert all(part.name.endswith(".gguf") for part in parts)
    assert dict(parse((folder / "Modelfile").read_text()))["from"] == "./gguf"
    body, files = request(folder)
    assert body["files"] == {part.name: f"sha256:{digest(part)['sha256']}" for part in parts}
    assert set(files.values()) == set(parts)
    assert len(request(whole)[0]["files"]) == 1, "the control"  # type: ignore[arg-type]
    manifest = Export.open(folder).manifest
    assert manifest.file == f"gguf/{parts[0].name}"
    assert (by_llama_cpp(folder / manifest.file) == by_llama_cpp(next(whole.glob("*.gguf")))).all()
