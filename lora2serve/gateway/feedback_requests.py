"""``POST /v1/feedback``: ground truth that comes later, joined to the answer that it is on."""

from __future__ import annotations

import time
from http import HTTPStatus

from lora2serve.errors import Lora2ServeError
from lora2serve.gateway.client_side import send_error, send_json
from lora2serve.gateway.model_names import parse_object
from lora2serve.gateway.record_writer import RecordWriter
from lora2serve.gateway.request_record import Feedback, text_hash
from lora2serve.gateway.security import is_request_id
from lora2serve.gateway.upstreams import Send
from lora2serve.system.json_values import Json

KEYS = ("request_id", "score", "label", "expected")
LONGEST_LABEL = 64
EXPECTED = 'expected {"request_id": ..., "score": 0 to 1} or "label" or "expected", the right answer'


def read_feedback(body: bytes) -> Feedback | list[str]:
    """The feedback in a body, or everything that is wrong with it."""
    content = parse_object(body)
    if content is None:
        return [f"not a JSON object: {EXPECTED}"]
    problems = [f"{key[:60]!r}: unknown, known: {', '.join(KEYS)}" for key in content if key not in KEYS]
    identity, score = content.get("request_id"), content.get("score")
    if not isinstance(identity, str) or not is_request_id(identity):
        problems.append("request_id: expected the X-Request-Id of an answer")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1):
        problems.append("score: expected a number from 0 (wrong) to 1 (right)")
    label, expected = _text(content, "label", problems), _text(content, "expected", problems)
    if len(label) > LONGEST_LABEL:
        problems.append(f"label: expected {LONGEST_LABEL} characters at most")
    if score is None and not label and not expected:
        problems.append(f"no score, label or expected answer: {EXPECTED}")
    if problems:
        return problems
    return Feedback(
        request_id=str(identity), at=time.time(), score=float(score) if isinstance(score, int | float) else None,
        label=label, expected_hash=text_hash(expected) if expected else "",
    )  # fmt: skip


async def take_feedback(body: bytes, writer: RecordWriter, send: Send) -> None:
    """Store it, and answer with the versions that it is on."""
    feedback = read_feedback(body)
    if not isinstance(feedback, Feedback):
        await send_error(send, HTTPStatus.BAD_REQUEST, "; ".join(feedback))
        return
    try:
        records = await writer.feedback(feedback)
    except Lora2ServeError as error:
        await send_error(send, HTTPStatus.SERVICE_UNAVAILABLE, error.message)
        return
    if not records:
        await send_error(send, HTTPStatus.NOT_FOUND, f"request_id {feedback.request_id}: no such request on record")
        return
    versions = [{"version": f"{record.name}@{record.version}", "arm": record.arm} for record in records]
    await send_json(send, HTTPStatus.OK, {"request_id": feedback.request_id, "versions": versions})


def _text(content: Json, key: str, problems: list[str]) -> str:
    value = content.get(key, "")
    if not isinstance(value, str):
        problems.append(f"{key}: expected text")
        return ""
    return value
