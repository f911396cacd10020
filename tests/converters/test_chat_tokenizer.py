"""What prompts depend on, read from a tokenizer's files and asked of transformers: the same, or transformers is asked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from converters.ollama import chat_tokenizer
from converters.ollama.chat_tokenizer import AS_IN_FILES, read_tokenizer
from lora2serve.exporting.sinks import ExportModel
from tests.support.runs import DEMO

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
BEGINS = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
}
# Keys of tokenizer_config.json over the demo's; ``special_tokens_map`` and ``post_processor`` are files' own.
CASES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "BOS by the post-processor": {"post_processor": BEGINS},
    "BOS by a key": {"add_bos_token": True},
    "no BOS by a key": {"add_bos_token": False, "post_processor": BEGINS},
    "only EOS by a key": {"add_eos_token": True, "post_processor": BEGINS},
    "no BOS at all": {"bos_token": None, "post_processor": BEGINS},
    "a token as an object": {"eos_token": {"content": "<|im_end|>", "lstrip": False, "__type": "AddedToken"}},
    "two files": {"eos_token": ..., "special_tokens_map": {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}},
    "two files that differ": {"special_tokens_map": {"eos_token": "<|endoftext|>"}},
    "not named": {"eos_token": ..., "bos_token": ...},
    "a token that a template names": {"chat_template": CHATML + "{{ unk_token }}"},
    "templates by name": {"chat_template": [{"name": "default", "template": CHATML}, {"name": "rag", "template": "x"}]},
    "no template": {"chat_template": None},
    "a token that is not there": {"eos_token": "<|over|>"},
}


def make_model(path: Path, kind: str, changes: dict[str, Any]) -> ExportModel:
    """The demo's tokenizer with another class and settings."""
    content = json.loads((DEMO / "base" / "tokenizer.json").read_text())
    content["post_processor"] = changes.get("post_processor", content["post_processor"])
    settings = json.loads((DEMO / "base" / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": kind, "chat_template": CHATML} | changes
    settings.pop("post_processor", None)
    if special := settings.pop("special_tokens_map", None):
        (path / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {key: value for key, value in settings.items() if value is not ...}
    (path / "tokenizer.json").write_text(json.dumps(content))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    source: Any = SimpleNamespace(config={"model_type": "llama"})
    return ExportModel(source, {file.name: file for file in path.iterdir()}, "demo", "base")


KINDS = [*AS_IN_FILES, "LlamaTokenizer"]
OFTEN = ("BOS by the post-processor", "only EOS by a key")  # for the classes that differ: each has its own of these


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, marks=[] if kind == KINDS[0] or case in OFTEN else [pytest.mark.slow])
        for case in CASES
        for kind in KINDS
    ],
)
def test_the_files_say_what_transformers_does(tmp_path: Path, case: str, kind: str) -> None:
    model = make_model(tmp_path, kind, CASES[case])
    read, asked = read_tokenizer(model, [0, 2]), chat_tokenizer._of_transformers(model, [0, 2])
    assert (read.template, read.texts, read.adds_bos) == (asked.template, asked.texts, asked.adds_bos)
    assert {*read.added} == {*asked.added}
    for name in ("bos_token", "eos_token"):
        assert read.special.get(name) == asked.special.get(name)


def test_what_the_files_do_not_say_is_asked(tmp_path: Path) -> None:
    """The control: without the detour, an answer would be another one."""
    for case, known in (("as it is", True), ("two files that differ", False), ("a token that is not there", False)):
        folder = tmp_path / case
        folder.mkdir()
        assert (chat_tokenizer._of_files(make_model(folder, "Qwen2TokenizerFast", CASES[case]), [0]) is None) != known
    (tmp_path / "ordinary").mkdir()
    model = make_model(tmp_path / "ordinary", "TokenizersBackend", {})
    assert chat_tokenizer._of_files(model, [300]) is None
    assert read_tokenizer(model, [300]).texts[300]
