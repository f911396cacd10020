"""Requests in OpenAI's form as ``serve --engine peft`` takes them: what it does not do is refused, never left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import cast

from lora2serve.config.schema import show
from lora2serve.data.rows import Message
from lora2serve.parity_check.engines.chat_engine import AnswerOptions
from lora2serve.parity_check.engines.served_peft import Prompt
from lora2serve.serving.llama_cpp_requests import RefusedRequest, accepted
from lora2serve.system.json_values import Json, JsonValue, at

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TAKEN = ("model", "stream", "stream_options", "max_tokens", "temperature", "stop")
OWN: Mapping[str, tuple[str, ...]] = {CHAT: ("messages", "max_completion_tokens"), COMPLETIONS: ("prompt",)}
# What says nothing about the answer, and values that are no wish.
SILENT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
NEUTRAL: Mapping[str, tuple[JsonValue, ...]] = {
    "n": (1,), "best_of": (1,), "top_p": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "echo": (False,),
    "logprobs": (False,), "tools": ([],), "tool_choice": ("none", "auto"), "logit_bias": ({},), "suffix": ("",),
    "response_format": ({"type": "text"},),
}  # fmt: skip
MOST_STOPS = 4  # as OpenAI has it


@dataclass(frozen=True)
class PeftRequest:
    """One question. ``counts``: a stream ends with how many tokens there were."""

    model: str
    prompt: Prompt
    options: AnswerOptions
    stops: tuple[str, ...]
    stream: bool
    counts: bool


def read_request(path: str, content: JsonValue, models: Collection[str]) -> PeftRequest:
    """A body of ``path``; RefusedRequest for another model, a wrong value, and what is not done here."""
    if not isinstance(content, dict):
        raise RefusedRequest("The body is no JSON object.", "body")
    model = content.get("model")
    if not isinstance(model, str) or model not in models:
        status = HTTPStatus.NOT_FOUND if isinstance(model, str) else HTTPStatus.BAD_REQUEST
        raise RefusedRequest(f"The model `{model}` does not exist. Here are: {', '.join(models)}.", "model", status)
    _refuse_others(path, content)
    limit = content.get("max_completion_tokens")
    limit = content.get("max_tokens") if limit is None else limit
    temperature = content.get("temperature")
    return PeftRequest(
        model=model,
        prompt=_chat(content, model) if path == CHAT else _text(content.get("prompt")),
        options=AnswerOptions(_whole(limit, "max_tokens"), _between(temperature, 2.0, "temperature")),
        stops=_stops(content.get("stop")),
        stream=content.get("stream") is True,
        counts=at(content, "stream_options", "include_usage") is True,
    )


def _refuse_others(path: str, content: Json) -> None:
    known = (*TAKEN, *OWN[path], *SILENT)
    for key, value in content.items():
        if key not in known and value is not None and value not in NEUTRAL.get(key, ()):
            raise RefusedRequest(f"{key}: {show(value)} is not done here; taken are {', '.join(known)}.", key)


def _chat(content: Json, model: str) -> Prompt:
    messages = accepted(content, model).get("messages")
    if not isinstance(messages, list) or not messages:
        raise RefusedRequest("messages: expected a list of them.", "messages")
    for number, message in enumerate(messages):
        if not isinstance(at(message, "role"), str) or not isinstance(at(message, "content"), str):
            raise RefusedRequest(f"messages[{number}]: expected a role and a content.", "messages")
    return Prompt(messages=[cast("Message", message) for message in messages])


def _text(value: JsonValue) -> Prompt:
    if isinstance(value, list) and len(value) == 1:
        value = value[0] if isinstance(value[0], str | list) else value
    if isinstance(value, str) and value:
        return Prompt(text=value)
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return Prompt(ids=[cast("int", token) for token in value])
    raise RefusedRequest("prompt: expected one text, or the ids of one.", "prompt")


def _whole(value: JsonValue, key: str) -> int | None:
    if value is None:
        return None
    if type(value) is not int or value < 1:
        raise RefusedRequest(f"{key}: {show(value)}, expected a whole number from 1.", key)
    return value


def _between(value: JsonValue, most: float, key: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise RefusedRequest(f"{key}: {show(value)}, expected 0 to {most:g}.", key)
    return float(value)


def _stops(value: JsonValue) -> tuple[str, ...]:
    words = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(words, list) or len(words) > MOST_STOPS or not all(isinstance(w, str) and w for w in words):
        raise RefusedRequest(f"stop: {show(value)}, expected a text, or up to {MOST_STOPS} of them.", "stop")
    return tuple(cast("str", word) for word in words)
