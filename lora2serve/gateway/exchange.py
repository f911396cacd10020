"""One request to one version while it lasts, and the record that is made of it."""

from __future__ import annotations

import importlib
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from lora2serve.errors import UsageError, first_line
from lora2serve.gateway.gateway_config import CaptureConfig
from lora2serve.gateway.model_names import COUNTED, parse_object
from lora2serve.gateway.request_record import CLIENT_LEFT, CUT_OFF, IN_STREAM, REFUSED, Arm, RequestRecord, text_hash
from lora2serve.system.json_values import Json, JsonValue, at, objects

MOST_DESCRIBED = 50  # requests a second whose texts figures are taken of: enough for any window
MOST_ANSWER = 8 << 20  # bytes of an answer that are looked at
FAILURES = ("error", "response.failed")  # events of /v1/responses; elsewhere an event has the key "error"
Redact = Callable[[str], str]
Describe = Callable[[str, str], Mapping[str, float]]


@dataclass(kw_only=True)
class Exchange:
    """What is known of a request, as it goes on. Times are those of ``time.perf_counter``."""

    request_id: str
    name: str
    version: int
    arm: Arm
    unit: str
    path: str
    content: Json  # the request's body
    stream: bool  # whether that was asked for
    streamed: bool = False  # whether the answer was events
    upstream: str = ""
    status: int = 0
    error: str = ""
    at: float = field(default_factory=time.time)
    start: float = field(default_factory=time.perf_counter)
    first: float | None = None  # the first byte of the answer's body
    last: float | None = None
    events: int = 0
    answer: list[bytes] = field(default_factory=list)
    answer_size: int = 0

    def begin(self) -> None:
        """It is sent now."""
        self.at, self.start = time.time(), time.perf_counter()

    def received(self, chunk: bytes) -> None:
        """A part of the answer came."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.events += 1
        self.answer_size += len(chunk)
        if self.answer_size <= MOST_ANSWER:
            self.answer.append(chunk)


@dataclass(frozen=True)
class ReplyText:
    """What an answer says: the text of its first choice, why it ended, and how many tokens both sides had."""

    text: str = ""
    finish: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    logprob: float | None = None  # mean of its tokens, where the client asked for it
    failed: bool = False  # it says that it could not go on: the status of a stream is sent before that is known


class Recorder:
    """Makes the records of exchanges, as the configuration says."""

    def __init__(self, config: CaptureConfig, describe: Describe | None = None) -> None:
        """UsageError where the function that redacts cannot be found."""
        self._config, self._describe = config, describe
        self._redact = _function(config.redact) if config.redact else None
        self._random = random.Random()
        self._described = 0.0  # when figures were taken last

    def record(self, exchange: Exchange) -> RequestRecord:
        """The record of an exchange that is over."""
        prompt, reply = prompt_text(exchange.content), read_reply(b"".join(exchange.answer), stream=exchange.streamed)
        end = exchange.last or time.perf_counter()
        error = _error(exchange, reply)
        whole = exchange.answer_size <= MOST_ANSWER and not error
        features = self._features(prompt, reply) if whole else {}
        texts = self._config.texts > 0 and self._random.random() < self._config.texts
        return RequestRecord(
            request_id=exchange.request_id, at=exchange.at, name=exchange.name, version=exchange.version,
            arm=exchange.arm, upstream=exchange.upstream, unit=exchange.unit, path=exchange.path,
            status=exchange.status, error=error, finish=reply.finish, stream=exchange.stream,
            seconds=end - exchange.start,
            first_token_seconds=exchange.first - exchange.start if exchange.stream and exchange.first else None,
            token_seconds=_token_seconds(exchange, reply),
            prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens,
            prompt_length=len(prompt), answer_length=len(reply.text),
            prompt_hash=text_hash(prompt), answer_hash=text_hash(reply.text) if whole else "",
            prompt=self._shown(prompt) if texts else None, answer=self._shown(reply.text) if texts else None,
            features=features,
        )  # fmt: skip

    def _features(self, prompt: str, reply: ReplyText) -> Mapping[str, float]:
        now = time.monotonic()
        if self._describe is None or now - self._described < 1 / MOST_DESCRIBED:
            return {}
        self._described = now
        known = {} if reply.logprob is None else {"answer.logprob": reply.logprob}
        return {**self._describe(prompt, reply.text), **known}

    def _shown(self, text: str) -> str | None:
        """A text as it may be kept; None where what redacts it fails: nothing is kept unredacted."""
        try:
            shown = self._redact(text) if self._redact else text
        except Exception:
            return None
        return shown[: self._config.longest_text] if isinstance(shown, str) else None


def error_of(status: int) -> str:
    """What an HTTP status says of the version: a request that is refused is the client's fault."""
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return "http"
    return REFUSED if status >= HTTPStatus.BAD_REQUEST else ""


def _error(exchange: Exchange, reply: ReplyText) -> str:
    """What went wrong, also behind a status that says nothing of it."""
    if reply.failed and exchange.error in ("", CLIENT_LEFT):  # clients leave when they see it
        return IN_STREAM
    if exchange.error:
        return exchange.error
    counted = exchange.streamed and exchange.path in COUNTED and exchange.answer_size <= MOST_ANSWER
    ended = bool(reply.finish) or b"".join(exchange.answer[-2:]).rstrip().endswith(b"[DONE]")
    return CUT_OFF if counted and not ended else ""


def prompt_text(content: Json) -> str:
    """The texts of a request: those of all messages, or the prompt."""
    if "messages" in content:
        return "\n".join(_content_text(message.get("content")) for message in objects(content["messages"]))
    return _content_text(content.get("prompt", content.get("input")))


def read_reply(raw: bytes, *, stream: bool) -> ReplyText:
    """What an answer says, in any of the forms of OpenAI's API and Ollama's."""
    parts, finish, usage, logprobs = list[str](), "", dict[str, JsonValue](), list[float]()
    failed = False
    for value in _stream_objects(raw) if stream else _whole(raw):
        failed |= bool(value.get("error")) or value.get("type") in FAILURES
        choice = next((item for item in objects(value.get("choices")) if item.get("index", 0) == 0), {})
        message = choice.get("delta") or choice.get("message") or value.get("message") or {}
        parts += [_content_text(at(message, "content")), _tool_calls(at(message, "tool_calls"))]
        parts += [_content_text(choice.get("text")), _content_text(value.get("response") if "done" in value else None)]
        if value.get("type") == "response.output_text.delta":
            parts.append(_content_text(value.get("delta")))
        for item in objects(value.get("output")) if not stream else ():
            parts += [_content_text(part.get("text")) for part in objects(item.get("content"))]
        logprobs += _logprobs(choice.get("logprobs"))
        finish = str(choice.get("finish_reason") or value.get("done_reason") or finish)
        counted = value.get("usage") or at(value, "response", "usage")
        usage = counted if isinstance(counted, dict) else usage
    return ReplyText(
        "".join(parts), finish, _count(usage, "prompt_tokens", "input_tokens"),
        _count(usage, "completion_tokens", "output_tokens"), sum(logprobs) / len(logprobs) if logprobs else None,
        failed,
    )  # fmt: skip


def _whole(raw: bytes) -> Iterator[Json]:
    content = parse_object(raw)
    if content is not None:
        yield content


def _stream_objects(raw: bytes) -> Iterator[Json]:
    """The objects of server-sent events, or of lines of JSON."""
    for line in raw.split(b"\n"):
        data = line.removeprefix(b"data:").strip()
        if data[:1] == b"{":
            content = parse_object(data)
            if content is not None:
                yield content


def _content_text(content: JsonValue) -> str:
    """A text, or the texts of a list of parts, in any depth."""
    texts, left = list[str](), [content]
    while left:
        item = left.pop()
        if isinstance(item, list) and item:
            left += [each.get("text", each.get("content")) if isinstance(each, dict) else each for each in item[::-1]]
        else:
            texts.append(item if isinstance(item, str) else "")
    return "\n".join(texts)


def _tool_calls(calls: JsonValue) -> str:
    parts = [(at(call, "function", "name"), at(call, "function", "arguments")) for call in objects(calls)]
    return "".join(part if isinstance(part, str) else json.dumps(part) for pair in parts for part in pair if part)


def _logprobs(value: JsonValue) -> list[float]:
    """Of the tokens of an answer, as chats have them, or completions."""
    of_tokens = [token.get("logprob") for token in objects(at(value, "content"))]
    listed = at(value, "token_logprobs")
    return [each for each in (of_tokens or (listed if isinstance(listed, list) else [])) if isinstance(each, float)]


def _count(usage: Mapping[str, JsonValue], *keys: str) -> int | None:
    return next((value for key in keys if isinstance(value := usage.get(key), int)), None)


def _token_seconds(exchange: Exchange, reply: ReplyText) -> float | None:
    steps = (reply.completion_tokens or exchange.events) - 1
    if not exchange.stream or not exchange.first or not exchange.last or steps < 1:
        return None
    return (exchange.last - exchange.first) / steps


def _function(name: str) -> Redact:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"capture.redact: {name}: {first_line(error)}", "such as mypackage.privacy:redact") from None
    if not callable(found):
        raise UsageError(f"capture.redact: {name}: not a function")
    return found  # type: ignore[no-any-return]
