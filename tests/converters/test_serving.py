"""serve.yaml and the generation config: what vLLM's own parser and registries make of them."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from converters.vllm.serve_config import TOOL_PARSERS, generation_config, serve_yaml, tool_parser
from converters.vllm.vllm_sink import served_config
from lora2serve.exporting.sinks import ExportModel
from tests.exporting.test_bundle import parsed_by_vllm
from tests.support.llama_cpp_source import chat_templates

DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "base"
HERMES = """{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for call in messages[0].tool_calls %}<tool_call>
{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}
</tool_call>{% endfor %}"""
EXPECTED = {
    "Qwen-Qwen2.5-7B-Instruct": "hermes",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
    "Qwen3-Coder": "qwen3_coder",
    "meta-llama-Llama-3.1-8B-Instruct": "llama3_json",
    "meta-llama-Llama-3.2-3B-Instruct": "llama3_json",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral",
    "ibm-granite-granite-3.3-2B-Instruct": "granite",
    "ibm-granite-granite-4.0": "granite4",
    "deepseek-ai-DeepSeek-V3.1": "deepseek_v31",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "deepseek_v3",
    "openai-gpt-oss-120b": "openai",
    "moonshotai-Kimi-K2": "kimi_k2",
    "GLM-4.6": "glm47",
    "MiniMax-M2": "minimax_m2",
    "ByteDance-Seed-OSS": "seed_oss",
    "google-gemma-4-31B-it": "gemma4",
    "google-gemma-2-2b-it": None,  # no tools at all
    "microsoft-Phi-3.5-mini-instruct": None,
    "meetkai-functionary-medium-v3.1": None,  # its own markup, with Llama's tokens
    "MiniMax-M1": None,
}


def test_parsers_are_told_by_the_markup() -> None:
    found = {name: tool_parser(chat_templates()[name]) for name in EXPECTED}
    assert found == EXPECTED
    assert tool_parser((DEMO / "chat_template.jinja").read_text()) is None


NAMES = {name for _, name in TOOL_PARSERS if name}


def test_vllm_names_every_one_of_them() -> None:
    """In its source: to import it takes seconds."""
    found = find_spec("vllm")
    assert found is not None and found.origin is not None
    source = (Path(found.origin).parent / "tool_parsers" / "__init__.py").read_text(encoding="utf-8")
    assert {name for name in NAMES if f'\n    "{name}": (' not in source} == set()


@pytest.mark.engine
def test_vllm_has_every_one_of_them() -> None:
    from vllm.tool_parsers import ToolParserManager

    assert set(ToolParserManager.list_registered()) >= NAMES


def model(folder: Path, config: dict[str, Any], **files: Any) -> ExportModel:
    found = {}
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        found[path.name] = path
    return ExportModel(SimpleNamespace(config=config), found, "mine: 'x'", "base")  # type: ignore[arg-type]


NESTED = {
    "model_type": "gemma3",
    "text_config": {"max_position_embeddings": 128, "eos_token_id": 9, "dtype": "float32"},
}


PLACES = ("chat_template__jinja", "tokenizer_config__json", "named")


def served_with(place: str, folder: Path) -> str:
    """serve.yaml of a model whose template for tools stands there."""
    said: Any = HERMES if place.startswith("chat") else {"chat_template": HERMES}
    if place == "named":
        said = {"chat_template": [{"name": "default", "template": "no"}, {"name": "tool_use", "template": HERMES}]}
    key = "tokenizer_config__json" if place == "named" else place
    return serve_yaml(model(folder, NESTED, **{key: said}), "bfloat16")


@pytest.mark.parametrize("place", PLACES)
def test_its_parser_of_tool_calls(place: str, tmp_path: Path) -> None:
    said = yaml.safe_load(served_with(place, tmp_path))
    assert said["enable-auto-tool-choice"] and said["tool-call-parser"] == "hermes"
    assert (said["max-model-len"], said["dtype"], said["served-model-name"]) == (128, "bfloat16", "mine: 'x'")


@pytest.mark.engine
@pytest.mark.parametrize("place", PLACES)
def test_vllm_reads_it(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the argument parser of ``vllm serve``; the control, a parser that it does not have, is refused by it."""
    text = served_with(place, tmp_path)
    (tmp_path / "serve.yaml").write_text(f"model: {tmp_path}\n{text}")
    seen = parsed_by_vllm(tmp_path, monkeypatch)
    assert seen.enable_auto_tool_choice and seen.tool_call_parser == "hermes"
    assert (seen.max_model_len, seen.dtype, seen.served_model_name) == (128, "bfloat16", ["mine: 'x'"])
    from vllm.entrypoints.launchers.launcher import validate_api_server_args

    validate_api_server_args(seen)
    seen.tool_call_parser = "hremes"
    with pytest.raises(KeyError, match="hremes"):
        validate_api_server_args(seen)


def test_nothing_of_tools_where_the_template_has_none(tmp_path: Path) -> None:
    assert "tool" not in serve_yaml(model(tmp_path, {"max_position_embeddings": 8}), "bfloat16")


def test_every_end_token(tmp_path: Path) -> None:
    """The base's, the config's and the tokenizer's; left as it is where it has them all."""
    tokenizer = {"tokenizer_config__json": {"eos_token": "<|im_end|>"}}
    tokenizer |= {"tokenizer__json": {"added_tokens": [{"id": 7, "content": "<|im_end|>"}]}}
    given = {"generation_config__json": {"eos_token_id": [2, 7], "temperature": 0.6}}
    assert generation_config(model(tmp_path, {"eos_token_id": 2}, **tokenizer, **given)) is None
    found = generation_config(model(tmp_path, {"eos_token_id": [2, 5], **NESTED}, **tokenizer, **given))
    assert found == {"eos_token_id": [2, 7, 5, 9], "temperature": 0.6}
    assert generation_config(model(tmp_path, {"eos_token_id": 2})) == {"eos_token_id": 2}
    assert generation_config(model(tmp_path, {})) is None


def test_a_nested_config_says_the_type_where_it_was() -> None:
    served = served_config({**NESTED, "quantization_config": {"quant_method": "bitsandbytes"}}, "bfloat16")
    assert served["text_config"]["dtype"] == served["dtype"] == "bfloat16"
    assert "quantization_config" not in served


@pytest.mark.parametrize(
    ("length", "line"), [(512, "max-model-len: 512"), ("9\ntrust-remote-code: true", ""), (-1, "")]
)
def test_a_length_is_a_number(tmp_path: Path, length: object, line: str) -> None:
    """A base's config is somebody else's: text in it could be lines of settings."""
    written = serve_yaml(model(tmp_path, {"max_position_embeddings": length}), "bfloat16")
    assert "trust" not in written
    assert [part for part in written.splitlines() if part.startswith("max")] == ([line] if line else [])
