"""serve.yaml comes with an export: what is in it reaches vLLM only where `export` writes such a thing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converters.vllm import serve_config
from lora2serve.cli import run as command
from lora2serve.errors import InputError
from lora2serve.exporting import bundle
from lora2serve.serving import serve_settings, server
from lora2serve.serving.server import ServeOptions
from tests.support.manifests import change_manifest, write_export

HOSTILE = {
    "a plugin": "tool-parser-plugin: ./evil.py",
    "the same, spelled otherwise": "tool_parser_plugin: ./evil.py",
    "code of the model": "trust-remote-code: true",
    "a list of flags": 'lora-modules: [\'{"name": "a", "path": "adapters/a"}\', \'--trust-remote-code\']',
    "a flag for a value": "served-model-name: --trust-remote-code",
    "a way out": 'lora-modules: [\'{"name": "a", "path": "adapters/../../x"}\']',
    "an absolute path": 'lora-modules: [\'{"name": "a", "path": "/adapters/a"}\']',
    "more than name and path": 'lora-modules: [\'{"name": "a", "path": "adapters/a", "x": 1}\']',
    "a type of object": "dtype: !!python/object/apply:os.system ['true']",
    "not a number": "max-model-len: .nan",
    "a negative one": "max-model-len: -1",
    "true for a number": "max-loras: true",
    "a list": "[trust-remote-code]",
    "a parser by its path": "tool-call-parser: ../x",
    "a key that is no text": "1: 2",
    "half a file": "model: [",
    "an object of objects": "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmodel: *c",
    "not text": 'model: "\\ud800\\0"',
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("target", ["vllm", "bundle"])
def test_refused(kind: str, target: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export = write_export(tmp_path / "export", target)
    (export / bundle.CONFIG).write_text(HOSTILE[kind] + "\n")
    assert command(["serve", str(export), "--dry-run"]) == 1
    out, err = capfd.readouterr()
    assert out == "" and f"{export / bundle.CONFIG}: " in err and "unexpected" not in err


@pytest.mark.parametrize("target", ["vllm", "bundle"])
def test_trusted(target: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The user has read it; its paths are relative to it."""
    export = write_export(tmp_path / "export", target)
    (export / bundle.CONFIG).write_text("trust-remote-code: true\n")
    assert command(["serve", str(export), "--dry-run", "--trust-export"]) == 0
    assert f"--config {export / bundle.CONFIG}" in capfd.readouterr().out
    assert server.plan([export], ServeOptions(trust_export=True)).folder == (export if target == "bundle" else None)


def test_deploy_refuses_it_as_well(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export = write_export(tmp_path / "export", "vllm")
    assert command(["deploy", "compose", str(export)]) == 0
    (export / bundle.CONFIG).write_text("trust-remote-code: true\n")
    assert command(["deploy", "compose", str(export)]) == 1
    assert "'trust-remote-code': unknown key" in capfd.readouterr().err


def test_all_problems_at_once(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("max_model_len: 5\ndtype: bf17\nmodel: org/base\n")
    with pytest.raises(InputError) as caught:
        serve_settings.read(file)
    first, second = caught.value.message.splitlines()
    assert first.endswith("'max_model_len': unknown key (did you mean 'max-model-len'?)")
    assert second.endswith("dtype: 'bf17', expected one of auto, half, float16, bfloat16, float, float32")


def test_what_export_writes_is_known(tmp_path: Path) -> None:
    """Each name of a parser that it may write, and every key of a bundle's file."""
    for _, parser in serve_config.TOOL_PARSERS:
        if parser:
            (tmp_path / "serve.yaml").write_text(f"tool-call-parser: {parser}\nenable-auto-tool-choice: true\n")
            assert serve_settings.read(tmp_path / "serve.yaml")["tool-call-parser"] == parser
    file = write_export(tmp_path / "export", "bundle") / bundle.CONFIG
    assert set(serve_settings.read(file)) <= set(serve_settings.KNOWN)


@pytest.mark.parametrize("target", ["vllm", "gguf"])
@pytest.mark.parametrize("name", ["--trust-remote-code", "a\nb", "\x1b[2J"])
def test_a_name_that_is_none(target: str, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export = write_export(tmp_path / "export", target)
    change_manifest(export, name="fine")
    text = (export / "lora2serve.json").read_text()
    (export / "lora2serve.json").write_text(text.replace('"fine"', json.dumps(name)))
    assert command(["serve", str(export), "--dry-run"]) == 1
    assert "name: " in capfd.readouterr().err


def test_paths_of_the_user_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine runs in a folder of its own. What names no file here stays as it is."""
    export = write_export(tmp_path / "export", "vllm")
    (tmp_path / "mine.jinja").write_text("")
    (tmp_path / "half").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ("--chat-template", "mine.jinja", "--dtype", "half", "--chat-template=./mine.jinja", "--x", "org/name")
    command = server.plan([Path("export")], ServeOptions(engine_arguments=words)).command
    mine = str(tmp_path / "mine.jinja")
    assert command[-7:] == ("--chat-template", mine, "--dtype", "half", f"--chat-template={mine}", "--x", "org/name")
    assert str(export) in command
