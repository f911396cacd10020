"""What vLLM is told beside the weights: serve.yaml, the tool parser, the tokens that end an answer."""

from __future__ import annotations

import json
from typing import Any

from lora2serve.data.end_tokens import TEXT_PARTS
from lora2serve.exporting.sinks import ExportModel
from lora2serve.system.small_files import JsonObject
from lora2serve.weights.chat_template import chat_template, read_settings, token_text

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


def serve_yaml(model: ExportModel, dtype: str) -> str:
    """Arguments for ``vllm serve DIR --config DIR/serve.yaml``: what this model needs and vLLM may not find itself.

    The chat template is none of them: vLLM takes it from the directory, and a path here would depend on where the
    server is started.
    """
    length = _text_config(model.config).get("max_position_embeddings")
    lines = ["# vllm serve . --config serve.yaml", f"served-model-name: {json.dumps(model.name)}", f"dtype: {dtype}"]
    lines += [f"max-model-len: {length}"] if isinstance(length, int) and length > 0 else []  # text may hold more lines
    parser = tool_parser(chat_template(model.files) or "")
    lines += ["enable-auto-tool-choice: true", f"tool-call-parser: {parser}"] if parser else []
    return "\n".join(lines) + "\n"


def tool_parser(template: str) -> str | None:
    """vLLM's name of the parser for the calls that this template writes; None where none is recognized."""
    plain = template.replace("\\u003c", "<").replace('\\"', '"').replace('"name" :', '"name":')
    if "tool" not in plain:
        return None
    return next((name for marks, name in TOOL_PARSERS if all(mark in plain for mark in marks)), None)


def generation_config(model: ExportModel) -> dict[str, Any] | None:
    """generation_config.json with every token that ends an answer; None where the one at hand has them, or none do.

    They are those of the base's generation config, of its config, the end token of the shipped tokenizer, and the one
    with which the chat template closes an answer.
    """
    generation = read_settings(model.files, "generation_config.json")
    before = _ids(generation.get("eos_token_id"))
    closing = model.answer_end[1] if model.answer_end else None
    config, text = model.config, _text_config(model.config)
    sources = [config.get("eos_token_id"), text.get("eos_token_id"), _tokenizer_end(model), closing]
    ends = list(dict.fromkeys([*before, *(token for source in sources for token in _ids(source))]))
    if ends == before:
        return None
    return {**generation, "eos_token_id": ends if len(ends) > 1 else ends[0]}


def _tokenizer_end(model: ExportModel) -> int | None:
    text = token_text(read_settings(model.files, "tokenizer_config.json").get("eos_token"))
    added = read_settings(model.files, "tokenizer.json").get("added_tokens") or []
    return next((int(token["id"]) for token in added if text and token.get("content") == text), None)


def _ids(value: Any) -> list[int]:
    return [int(token) for token in (value if isinstance(value, list) else [value]) if token is not None]


def _text_config(config: JsonObject) -> JsonObject:
    text: JsonObject = next((config[part] for part in TEXT_PARTS if isinstance(config.get(part), dict)), config)
    return text
