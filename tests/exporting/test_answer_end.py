"""The token that closes an answer: found as transformers renders it, and known to every engine."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Set
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from converters.vllm.serve_config import generation_config
from lora2serve.data.end_tokens import find_answer_end
from lora2serve.exporting.answer_end import read_answer_end
from lora2serve.exporting.sinks import ExportModel
from tests.support.llama_cpp_source import chat_templates, in_a_few_templates
from tests.support.runs import DEMO

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
KNOWN = {
    "Qwen-Qwen2.5-7B-Instruct": "<|im_end|>",
    "meta-llama-Llama-3.1-8B-Instruct": "<|eot_id|>",
    "google-gemma-2-2b-it": "<end_of_turn>",
    "microsoft-Phi-3.5-mini-instruct": "<|end|>",
    "mistralai-Mistral-Nemo-Instruct-2407": "</s>",
    "GLM-4.6": "<|user|>",  # nothing closes the last answer: the next turn does
    "openai-gpt-oss-120b": "<|return|>",  # not <|end|>, which closes thoughts
    "upstage-Solar-Open-100B": None,  # one token for thoughts and answers
    "Kimi-K3": None,
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% generation %}{{ m.content }}{% endgeneration %}CLOSE\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokens_of(template: str) -> set[str]:
    """What looks like a special token in it."""
    return set(re.findall(r"<[^<>\s'\"{}]{1,40}>", template)) | set(SPECIAL.values())


def make_files(path: Path, template: str, end: str = "<|endoftext|>", **tokens: str) -> dict[str, Path]:
    """The demo's tokenizer with another template, end token and texts of tokens."""
    path.mkdir()
    content = (DEMO / "base" / "tokenizer.json").read_text()
    for old, new in tokens.items():
        content = content.replace(f"<|{old}|>", new)
    (path / "tokenizer.json").write_text(content)
    settings = json.loads((DEMO / "base" / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": end}))
    (path / "chat_template.jinja").write_text(template)
    return {file.name: file for file in path.iterdir()}


def answer_ends(folder: Path, template: str) -> tuple[str | None, str | None]:
    """By our light Jinja, and by transformers' own."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = tokens_of(template)
    added = [{"id": number, "content": token} for number, token in enumerate(sorted(tokens))]
    contents = {
        "tokenizer.json": json.dumps({"added_tokens": added}), "tokenizer_config.json": json.dumps(SPECIAL),
        "chat_template.jinja": template,
    }  # fmt: skip
    for file, content in contents.items():
        (folder / file).write_text(content)

    def render(messages: Any) -> str:
        return str(render_jinja_template([[dict(m) for m in messages]], chat_template=template, **SPECIAL)[0][0])

    found = read_answer_end({name: folder / name for name in contents})
    return found[0] if found else None, find_answer_end(render, tokens)


def long(name: str) -> bool:
    """To compile it takes as long as to compile three others. One that has no end stays: the control."""
    return len(chat_templates()[name]) > 4000 and name != "upstage-Solar-Open-100B"


def check(folder: Path, names: Set[str]) -> None:
    ends = {name: answer_ends(folder, chat_templates()[name]) for name in sorted(names)}
    assert {name: pair for name, pair in ends.items() if pair[0] != pair[1]} == {}
    assert {name: ends[name][0] for name in KNOWN if name in names} == {n: KNOWN[n] for n in KNOWN if n in names}
    assert names & KNOWN.keys()


@in_a_few_templates
def test_it_is_what_transformers_renders(few: bool, tmp_path: Path) -> None:
    check(tmp_path, {name for name in {*chat_templates(few), *KNOWN} if not few or not long(name)})


@pytest.mark.engine
def test_it_is_what_transformers_renders_of_long_ones(tmp_path: Path) -> None:
    check(tmp_path, {name for name in {*chat_templates(True), *KNOWN} if long(name)})


@pytest.mark.parametrize(("end", "expected"), [("<|endoftext|>", [0, 2]), ("<|im_end|>", None)])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3", "granite"])
def test_vllm_stops_there(tmp_path: Path, kind: str, end: str, expected: list[int] | None) -> None:
    """A base model's generation config stops at another token; the control has the right one already."""
    files = make_files(tmp_path / "base", CHATML.replace("CLOSE", "<|im_end|>"), end)
    ids = {token["content"]: token["id"] for token in json.loads(files["tokenizer.json"].read_text())["added_tokens"]}
    stop = ids[end]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    source: Any = SimpleNamespace(config={"model_type": kind, "eos_token_id": stop})
    model = ExportModel(source, files | {"generation_config.json": tmp_path / "generation_config.json"}, "m", "base")
    found = generation_config(model)
    assert (found and sorted(found["eos_token_id"])) == (expected and sorted([ids["<|endoftext|>"], ids["<|im_end|>"]]))


@pytest.mark.engine
@pytest.mark.parametrize(("closing", "key"), [("<|im_end|>", False), ("<|turn-over|>", True), ("<|ende|>", True)])
def test_llama_cpp_stops_there(tmp_path: Path, closing: str, key: bool) -> None:
    """It knows some tokens by their text; any other is named in the file. The control: what it knew is not."""
    import gguf
    import llama_cpp

    from lora2serve.cli import run
    from tests.support.tiny import make_model

    base = make_model(tmp_path / "base", vocab_size=1536, bos_token_id=None, eos_token_id=0)
    files = make_files(tmp_path / "tokenizer", CHATML.replace("CLOSE", closing), im_end=closing)
    for file in files.values():
        shutil.copy(file, base)
    assert run(["export", str(base), "-t", "ollama", "-q", "F16", "-o", str(tmp_path / "out")]) == 0
    folder = tmp_path / "out" / "ollama-F16"
    path = next(folder.glob("*.gguf"))
    assert ("tokenizer.ggml.eot_token_id" in gguf.GGUFReader(path).fields) == key
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    (token,) = model.tokenize(closing.encode(), add_bos=False, special=True)
    assert llama_cpp.llama_vocab_is_eog(vocab, token)
    assert f'PARAMETER stop "{closing}"' in (folder / "Modelfile").read_text()
