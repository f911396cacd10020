"""What vLLM is told beside the weights: serve.yaml, the tool parser, the tokens that end an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lora2serve.exporting.sinks import ExportModel

# The markup in which a template writes a call of a tool -> the parser of vLLM 0.32.0 (``vllm/tool_parsers``) that reads
# it. All marks of a row must be there; the first row counts, so what is more special comes first.
TOOL_PARSERS: tuple[tuple[tuple[str, ...], str | None], ...] = (
    (("[TOOL_CALLS]",), "mistral"),
    (("<seed:tool_call>",), "seed_oss"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁calls▁begin｜>",), "deepseek_v31"),
    (("<|START_ACTION|>",), "cohere_command3"),
    (("<|tool_call_start|>",), "lfm2"),
    (("<start_function_call>",), "functiongemma"),
    (("<|start_of_role|>", "<tool_call>"), "granite4"),
    (("<|start_of_role|>", "<|tool_call|>"), "granite"),
    (("[gMASK]", "<tool_call>", "<arg_key>"), "glm47"),
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<tool_calls>",), None),  # several models write it, each in another way
    (("<tool_call>", '"name":', '"arguments":'), "hermes"),
    (("<|start_header_id|>ipython", '"name":', '"parameters":'), "llama3_json"),
    (("<|start|>", "<|channel|>commentary", "functions."), "openai"),
    (("<|tool_call>",), "gemma4"),
)
TEXT_PARTS = ("text_config", "llm_config", "language_config")


def serve_yaml(model: ExportModel, dtype: str) -> str:
    """Arguments for ``vllm serve DIR --config DIR/serve.yaml``: what this model needs and vLLM may not find itself.

    The chat template is none of them: vLLM takes it from the directory, and a path here would depend on where the
    server is started.
    """
    length = _text_config(model.config).get("max_position_embeddings")
    lines = ["# vllm serve . --config serve.yaml", f"served-model-name: {json.dumps(model.name)}", f"dtype: {dtype}"]
    lines += [f"max-model-len: {length}"] if length else []
    parser = tool_parser(chat_template(model))
    lines += ["enable-auto-tool-choice: true", f"tool-call-parser: {parser}"] if parser else []
    return "\n".join(lines) + "\n"


def tool_parser(template: str) -> str | None:
    """vLLM's name of the parser for the calls that this template writes; None where none is recognised."""
    plain = template.replace("\\u003c", "<").replace('\\"', '"').replace('"name" :', '"name":')
    if "tool" not in plain:
        return None
    return next((name for marks, name in TOOL_PARSERS if all(mark in plain for mark in marks)), None)


def chat_template(model: ExportModel) -> str:
    """The template that is shipped, the one for tools where there are several; empty where there is none."""
    if "chat_template.jinja" in model.files:
        return model.files["chat_template.jinja"].read_text(encoding="utf-8")
    said = _json(model, "tokenizer_config.json").get("chat_template") or _json(model, "chat_template.json").get(
        "chat_template"
    )
    if isinstance(said, list):
        named = {str(one.get("name")): str(one.get("template")) for one in said if isinstance(one, dict)}
        return named.get("tool_use") or named.get("default") or ""
    return said if isinstance(said, str) else ""


def generation_config(model: ExportModel) -> dict[str, Any] | None:
    """generation_config.json with every token that ends an answer; None where the one at hand has them, or none do.

    They are those of the base's generation config, of its config, and the end token of the shipped tokenizer.
    """
    given = _json(model, "generation_config.json")
    before = _ids(given.get("eos_token_id"))
    said = [model.config.get("eos_token_id"), _text_config(model.config).get("eos_token_id"), _tokenizer_end(model)]
    found = list(dict.fromkeys([*before, *(token for part in said for token in _ids(part))]))
    if found == before:
        return None
    return {**given, "eos_token_id": found if len(found) > 1 else found[0]}


def _tokenizer_end(model: ExportModel) -> int | None:
    end = _json(model, "tokenizer_config.json").get("eos_token")
    text = end.get("content") if isinstance(end, dict) else end
    added = _json(model, "tokenizer.json").get("added_tokens") or []
    return next((int(token["id"]) for token in added if text and token.get("content") == text), None)


def _ids(said: Any) -> list[int]:
    return [int(token) for token in (said if isinstance(said, list) else [said]) if token is not None]


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next((config[part] for part in TEXT_PARTS if isinstance(config.get(part), dict)), config)
    return found


def _json(model: ExportModel, name: str) -> dict[str, Any]:
    if name not in model.files:
        return {}
    content = json.loads(model.files[name].read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
