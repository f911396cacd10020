"""The name of a model in requests and answers: replaced where JSON has it, every other byte left as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache

from lora2serve.system.json_values import Json, JsonValue

KEY = rb'(?<!\\)"model"[ \t\r\n]*:[ \t\r\n]*'  # inside a text the quotes would have a backslash before them
USAGE_EVENT = re.compile(
    rb'(?m)^data:[^\n]*?(?<!\\)"choices"\s*:\s*\[\][^\n]*(?<!\\)"usage"\s*:\s*\{[^\n]*\r?\n\r?\n'
)  # what a server sends last, and only where it is asked for
# The event that ends the only choice; vLLM has its fingerprint there, or in the event that tells tokens.
FINISH_EVENT = re.compile(rb'(?m)^data:[^\n]*(?<!\\)"finish_reason"\s*:\s*"[^\n]*(?=\}\r?\n\r?\n)')
FINGERPRINT = re.compile(rb'(?<!\\)"system_fingerprint"\s*:\s*"[^"]*"')
EVENT_ENDS, LINE_ENDS = (b"\n\n", b"\n\r\n"), (b"\n",)
DEEPEST = 100  # levels of a request; no message, tool or schema comes near
COUNTED = ("/v1/chat/completions", "/v1/completions")  # where a stream tells its tokens when it is asked to
ASKED = b'"stream_options":{"include_usage":true}'


def parse_object(body: bytes) -> Json | None:
    """The JSON object in a body; None where it is none."""
    try:
        value: JsonValue = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def is_too_deep(body: bytes, content: Json) -> bool:
    """Whether a body is nested deeper than any request is; what reads it after us might give up somewhere inside."""
    if body.count(b"[") + body.count(b"{") <= DEEPEST:
        return False
    level: list[JsonValue] = [content]
    for _ in range(DEEPEST):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [value for values in inner for value in values]
        if not level:
            return False
    return True


def with_model(body: bytes, content: Json, model: str) -> bytes:
    """The body with another value of its own ``model`` key: only the bytes of that value change.

    content: what ``body`` is, parsed.
    """
    old, new = (
        json.dumps(content["model"], ensure_ascii=False).encode("utf-8", "surrogatepass"),
        json.dumps(model).encode(),
    )
    ends = [match.end() for match in re.finditer(KEY + re.escape(old), body)]
    plain = len(ends) == 1 and b"\\u" not in body  # no key can be spelled in another way
    for end in ends:
        replaced = body[: end - len(old)] + new + body[end:]
        # objects inside may have such a key, too: the right one is that which changes the whole as it should
        if plain or parse_object(replaced) == {**content, "model": model}:
            return replaced
    return json.dumps({**content, "model": model}).encode()  # written with escapes, or not in UTF-8


def counting_tokens(body: bytes, content: Json, path: str) -> tuple[bytes, bool]:
    """The body of a stream that tells its tokens at the end; whether that was added, and must be taken out again."""
    several = content.get("n") not in (None, 1)  # choices that end one after another
    asked = content.get("stream") is not True or "stream_options" in content or path not in COUNTED or several
    end = body.rfind(b"}")
    if asked or end < 0 or body[:1] in (b"\xff", b"\xfe", b"\0"):
        return body, False
    return body[:end] + b"," + ASKED + body[end:], True


@lru_cache(maxsize=1000)
def _pattern(model: str) -> re.Pattern[bytes]:
    return re.compile(b"(" + KEY + b")" + re.escape(json.dumps(model).encode()))


class AnswerNames:
    """Puts the client's name for a model where the server has its own.

    model: what the server calls it; shown: what the client does. usage: take out the event that tells tokens.
    """

    def __init__(self, model: str, shown: str, *, usage: bool = False) -> None:
        self._pattern = _pattern(model)
        self._shown = json.dumps(shown).encode()
        self._usage = usage
        self._rest = b""

    def whole(self, body: bytes) -> bytes:
        """A complete answer."""
        return self._pattern.sub(lambda match: match[1] + self._shown, body)

    def events(self, chunk: bytes, endings: Sequence[bytes] = EVENT_ENDS) -> bytes:
        """The events of a stream that are complete with this chunk; the beginning of the next one waits."""
        data = self._rest + chunk
        end = max((data.rfind(ending) + len(ending) for ending in endings if ending in data), default=0)
        if self._usage and not USAGE_EVENT.search(data, 0, end):
            finish = FINISH_EVENT.search(data, 0, end)
            end = finish.start() if finish else end  # it waits for the tokens, which come at once
        self._rest = data[end:]
        return self._replaced(data[:end])

    def last(self) -> bytes:
        """What is left when the stream ends."""
        rest, self._rest = self._rest, b""
        return self._replaced(rest)

    def _replaced(self, data: bytes) -> bytes:
        if b'"model"' in data:
            data = self.whole(data)
        if self._usage and b'"usage"' in data:
            told = USAGE_EVENT.search(data)
            fingerprint, data = told and FINGERPRINT.search(told[0]), USAGE_EVENT.sub(b"", data)
            if fingerprint and not FINGERPRINT.search(data):
                data = FINISH_EVENT.sub(lambda match: match[0] + b"," + fingerprint[0], data)
        return data
